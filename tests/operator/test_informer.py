"""The informer against a small API server written here: pages, watch, bookmarks, 410, silence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes_client

from tuneward_operator import informer as informers
from tuneward_operator.cache import Cache
from tuneward_operator.informer import Informer
from tuneward_operator.kube import CLAIMS, Kube, Resource
from tuneward_operator.settings import Settings
from tuneward_operator.views import ClaimView, claim_view


def claim(name: str, version: int, uid: str = "") -> dict[str, Any]:
    metadata = {"namespace": "team", "name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {"accessModes": ["ReadWriteMany"]}}


@dataclass
class Server:
    """`lists` are served one after another, the last for ever; `events` feed the watch that is open now."""

    lists: list[list[dict[str, Any]]]
    version: int = 10
    page: int = 2
    asked: list[dict[str, str]] = field(default_factory=list)
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(dict(request.query))
        return await self._watch(request) if "watch" in request.query else self._list(request)

    def _list(self, request: web.Request) -> web.Response:
        start = int(request.query.get("continue", "0"))
        items = self.lists[0]
        rest = start + self.page
        more = {"continue": str(rest)} if rest < len(items) else {}
        if not more and len(self.lists) > 1:
            self.lists.pop(0)
        metadata = {"resourceVersion": str(self.version), **more}
        # The real server, too, writes null for a list of metadata that holds nothing.
        return web.Response(body=orjson.dumps({"metadata": metadata, "items": items[start:rest] or None}))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            event = await self.events.get()
            if event["type"] == "HANG-UP":
                return response
            await response.write(orjson.dumps(event) + b"\n")

    def says(self, kind: str, item: dict[str, Any]) -> None:
        self.events.put_nowait({"type": kind, "object": item})


@contextlib.asynccontextmanager
async def informed(
    server: Server, find: Callable[[], Awaitable[Resource | None]] | None = None
) -> AsyncIterator[tuple[Cache[ClaimView], asyncio.Queue[ClaimView]]]:
    application = web.Application()
    application.router.add_get("/api/v1/persistentvolumeclaims", server.answer)
    async with TestServer(application) as listening:
        configuration = kubernetes_client.Configuration(host=str(listening.make_url("")).rstrip("/"))
        kube = Kube(configuration, Settings())
        cache: Cache[ClaimView] = Cache()
        changes: asyncio.Queue[ClaimView] = asyncio.Queue()
        informer = Informer(kube, CLAIMS, cache, claim_view, changes.put_nowait, selector="a=b", find=find)
        task = asyncio.create_task(informer.run())
        await informer.synced.wait()
        yield cache, changes
        task.cancel()
        await kube.close()


def names(cache: Cache[ClaimView]) -> list[str]:
    return sorted(value.name for value in cache)


async def test_a_list_comes_in_pages_and_the_watch_goes_on_from_it() -> None:
    server = Server([[claim("a", 1), claim("b", 2), claim("c", 3)]])
    async with informed(server) as (cache, changes):
        assert names(cache) == ["a", "b", "c"]
        assert [changes.get_nowait().name for _ in range(3)] == ["a", "b", "c"]
        server.says("ADDED", claim("d", 11))
        server.says("DELETED", claim("a", 12))
        assert [(await changes.get()).name for _ in range(2)] == ["d", "a"]
        assert names(cache) == ["b", "c", "d"]
    assert [query.get("continue") for query in server.asked[:2]] == [None, "2"]
    assert server.asked[2]["resourceVersion"] == "10"
    assert all(query["labelSelector"] == "a=b" for query in server.asked)


async def test_a_watch_that_ends_goes_on_from_the_last_bookmark() -> None:
    server = Server([[]])
    async with informed(server) as (_, changes):
        server.says("BOOKMARK", {"metadata": {"resourceVersion": "77"}})
        server.says("HANG-UP", {})
        server.says("ADDED", claim("a", 78))
        await changes.get()
    assert [query.get("resourceVersion") for query in server.asked] == [None, "10", "77"]


async def test_after_a_410_the_list_notices_what_vanished() -> None:
    server = Server([[claim("a", 1), claim("b", 2)], [claim("b", 2)]])
    async with informed(server) as (cache, changes):
        for _ in range(2):
            changes.get_nowait()
        server.says("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})
        assert (await changes.get()).name == "a"
        assert names(cache) == ["b"]
        # What did not change is no news.
        assert changes.empty()


async def test_a_kind_that_the_cluster_lacks_holds_nobody_up_and_is_found_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(informers, "ABSENT_SECONDS", 0.01)
    server = Server([[claim("a", 1)]])
    there = asyncio.Event()

    async def find() -> Resource | None:
        return CLAIMS if there.is_set() else None

    async with informed(server, find) as (cache, changes):
        assert names(cache) == []
        there.set()
        assert (await changes.get()).name == "a"


async def test_a_silent_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(informers, "IDLE_SECONDS", 0.2)
    server = Server([[claim("a", 1)], []])
    async with informed(server) as (cache, changes):
        changes.get_nowait()
        assert (await changes.get()).name == "a"
        assert names(cache) == []
