"""Finds what the watch of our own kinds missed, by a metadata-only list every few minutes.

Kopf lists again after a lost watch and reports no deletions, so ghosts stay in its callers' caches. And a watch whose
connection died without a word shows nothing at all: what the list shows and the cache still lacks a moment later was missed.
"""

from __future__ import annotations

import asyncio
import logging
import random

from tuneward_operator.app import App
from tuneward_operator.cache import ObjectKey
from tuneward_operator.kube import OWN_KINDS, ApiError, Resource

logger = logging.getLogger(__name__)

CONFIRM_SECONDS = 30.0


async def run(app: App) -> None:
    while True:
        await asyncio.sleep(app.settings.sweep_seconds * random.uniform(0.9, 1.1))
        for resource in OWN_KINDS:
            try:
                await sweep(app, resource)
            except ApiError as error:
                logger.warning("sweep of %s: %s", resource.plural, error)
        app.board.retain({pod.uid for pod in app.caches.pods})


async def sweep(app: App, resource: Resource) -> None:
    """Drops ghosts; names a kind deaf when what was missed stays missed."""
    late: dict[ObjectKey, int] = {}
    for namespace in app.settings.namespaces or (None,):
        late.update(await drop_ghosts(app, resource, namespace))
    if late:
        await asyncio.sleep(CONFIRM_SECONDS)
        await confirm(app, resource, late)


async def drop_ghosts(app: App, resource: Resource, namespace: str | None) -> dict[ObjectKey, int]:
    """Returns what the list shows and the cache does not have yet: versions by key."""
    cached = app.caches.of(resource.kind)
    assert cached is not None
    cache, _ = cached
    listed: dict[ObjectKey, int] = {}
    version = 0
    async for page in app.kube.metadata_pages(resource, namespace):
        version = version or int(page["metadata"]["resourceVersion"])
        for item in page["items"]:
            metadata = item["metadata"]
            listed[ObjectKey(metadata["namespace"], metadata["name"])] = int(metadata["resourceVersion"])
    for ghost in cache.retain(set(listed), version, namespace):
        logger.info("%s %s/%s vanished unseen", resource.kind, ghost.namespace, ghost.name)
        app.changed(resource, ghost)
    return {key: seen for key, seen in listed.items() if _version(cache.get(*key)) < seen}


async def confirm(app: App, resource: Resource, late: dict[ObjectKey, int]) -> None:
    """Reads what is still missing, so that nothing waits for the restart that /livez asks for."""
    cached = app.caches.of(resource.kind)
    assert cached is not None
    for key, version in late.items():
        if _version(cached[0].get(*key)) < version:
            found = await app.kube.get(resource, *key)
            if found is not None:
                app.deaf.add(resource.plural)
                app.seen(resource, "MODIFIED", found)


def _version(value: object) -> int:
    return getattr(value, "version", 0)
