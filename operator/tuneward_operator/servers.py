"""A stub until its reconcile lands."""

from __future__ import annotations

from tuneward_operator.app import App
from tuneward_operator.queue import Key


async def reconcile(app: App, key: Key) -> float | None:  # noqa: ARG001
    return None
