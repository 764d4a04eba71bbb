"""FineTuneJob: one pass."""

from __future__ import annotations

from collections.abc import Iterator

from tuneward_operator.app import App
from tuneward_operator.poll import Leader
from tuneward_operator.queue import Key


async def reconcile(app: App, key: Key) -> float | None:  # noqa: ARG001
    return None


def leaders(app: App) -> Iterator[Leader]:  # noqa: ARG001
    return iter(())
