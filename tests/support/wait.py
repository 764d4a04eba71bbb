"""Waiting for a condition with a deadline: tests never sleep for a guessed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], *, what: str, timeout: float = 60, interval: float = 0.05) -> T:
    """The first truthy value of `condition`. Raises AssertionError naming `what` and the last value at the deadline."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s for {what}; last: {value!r}")
        time.sleep(interval)
