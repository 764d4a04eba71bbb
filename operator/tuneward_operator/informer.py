"""Keeps one cache equal to one kind of the cluster: a paginated list, then a watch with bookmarks.

Kopf watches our own kinds; children come through here, because Kopf handles every event in order and in full, which costs
three times the CPU, and reports nothing of what vanished while its watch was down.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import aiohttp
import orjson

from tuneward_operator.cache import Cache, ObjectKey, Seen
from tuneward_operator.kube import ApiError, Kube, Resource

logger = logging.getLogger(__name__)

V = TypeVar("V", bound=Seen)

WATCH_SECONDS = 290
"""A total timeout of 300 s in aiohttp or a proxy would cut the watch in the middle of an event."""
IDLE_SECONDS = 90.0
"""Bookmarks come about once a minute: a longer silence is a dead connection."""
LONGEST_WAIT = 30.0
ABSENT_SECONDS = 60.0
"""To the next look for a kind that the cluster does not have."""


class Informer(Generic[V]):
    """`project` makes the slim value of an object; `changed` hears of every value that came, changed or went. `find`: of a
    kind that the cluster may lack, and that nobody waits for, its resource as the cluster has it, or None."""

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        cache: Cache[V],
        project: Callable[[dict[str, Any]], V],
        changed: Callable[[V], None],
        *,
        namespace: str | None = None,
        selector: str = "",
        find: Callable[[], Awaitable[Resource | None]] | None = None,
    ) -> None:
        self.resource = resource
        self.synced = asyncio.Event()
        self.last_activity = time.monotonic()
        self._kube = kube
        self._cache = cache
        self._project = project
        self._changed = changed
        self._namespace = namespace
        self._selector = selector
        self._find = find

    async def run(self) -> None:
        """For ever. Any failure is a list from scratch after a growing, jittered wait."""
        wait = 0.5
        while True:
            try:
                if not await self._is_there():
                    self.synced.set()
                    await asyncio.sleep(ABSENT_SECONDS)
                    continue
                version = await self._list()
                wait = 0.5
                self.synced.set()
                while True:
                    version = await self._watch(version)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
                gone = isinstance(error, ApiError) and error.status == 410
                if self._find is not None:
                    self.synced.set()
                logger.log(logging.INFO if gone else logging.WARNING, "watch of %s: %s", self.resource.plural, error)
                await asyncio.sleep(0 if gone else wait * random.uniform(0.5, 1.5))
                wait = min(LONGEST_WAIT, wait * 2)

    async def _is_there(self) -> bool:
        """Whether the cluster has the kind, of one that it may lack."""
        found = await self._find() if self._find is not None else self.resource
        self._alive()
        self.resource = found or self.resource
        return found is not None

    async def _list(self) -> str:
        found: set[ObjectKey] = set()
        version = ""
        async for page in self._kube.pages(self.resource, self._namespace, self._selector):
            # All pages of a list show the same moment; one that took too long is a 410, and begins again.
            version = version or page["metadata"]["resourceVersion"]
            for item in page["items"]:
                value = self._project(item)
                found.add(value.key)
                self._put(value)
            self._alive()
        for value in self._cache.retain(found, int(version), self._namespace):
            self._changed(value)
        return version

    async def _watch(self, version: str) -> str:
        events = self._kube.watch(
            self.resource, self._namespace, self._selector, version, lasts=WATCH_SECONDS, idle=IDLE_SECONDS
        )
        async for event in events:
            self._alive()
            item = event["object"]
            if event["type"] == "ERROR":
                raise ApiError(item.get("code", 0), item.get("reason", ""), item.get("message", ""))
            version = item["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._remove(self._project(item))
            elif event["type"] != "BOOKMARK":
                self._put(self._project(item))
        self._alive()
        return version

    def _put(self, value: V) -> None:
        known = self._cache.get(*value.key)
        if self._cache.put(value) and (known is None or known.version != value.version):
            self._changed(value)

    def _remove(self, value: V) -> None:
        if self._cache.remove(value.key, value.uid) is not None:
            self._changed(value)

    def _alive(self) -> None:
        self.last_activity = time.monotonic()
