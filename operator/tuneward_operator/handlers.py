"""Kopf's part: it watches our three kinds and calls these lines. Nothing else may happen here.

Kopf handles every event of an object in order, so a handler that takes time builds a backlog of stale bodies.
"""

from __future__ import annotations

from typing import Any

import kopf

from tuneward_api.names import GROUP, VERSION
from tuneward_operator.app import App
from tuneward_operator.kube import FINETUNEDMODELS, FINETUNEJOBS, MODELSERVERS


class NoDiffBase(kopf.DiffBaseStorage):
    """Kopf copies each object deeply to remember it, even where no handler asks for differences: half of its CPU."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def kopf_settings(*, scanning: bool) -> kopf.OperatorSettings:
    """`scanning` False: with Roles only, nobody may list CRDs or namespaces."""
    settings = kopf.OperatorSettings()
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = not scanning
    # Unchunked lists of 10,000 objects are 30 MB in one answer.
    settings.watching.chunk_size = 500
    # Below aiohttp's total timeout of 300 s, which would cut a watch within an event.
    settings.watching.server_timeout = 290
    settings.process.ultimate_exiting_timeout = 30
    return settings


def register(registry: kopf.OperatorRegistry, app: App, login: Any) -> None:
    """One line a kind."""

    @kopf.on.event(GROUP, VERSION, FINETUNEJOBS.plural, registry=registry)
    async def finetunejob(event: Any, **_: Any) -> None:
        app.seen(FINETUNEJOBS, event["type"], event["object"])

    @kopf.on.event(GROUP, VERSION, FINETUNEDMODELS.plural, registry=registry)
    async def finetunedmodel(event: Any, **_: Any) -> None:
        app.seen(FINETUNEDMODELS, event["type"], event["object"])

    @kopf.on.event(GROUP, VERSION, MODELSERVERS.plural, registry=registry)
    async def modelserver(event: Any, **_: Any) -> None:
        app.seen(MODELSERVERS, event["type"], event["object"])

    kopf.on.login(registry=registry)(login)
