"""Which keys wait for a pass. The semantics are client-go's work queue.

A key is in at most one pass at a time; a key added during its own pass gets another one after it. Any number of events
for a key that waits are one pass. Failures are delayed by key, so that one broken object never slows the others.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from typing import NamedTuple

FIRST_BACKOFF = 0.25
LAST_BACKOFF = 60.0


class Key(NamedTuple):
    """One object of ours."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"


class KeyedQueue:
    """Urgent keys come first: after a restart with 10,000 jobs a new one must not wait for the resync of the old ones."""

    def __init__(self) -> None:
        self._urgent: deque[Key] = deque()
        self._normal: deque[Key] = deque()
        self._dirty: dict[Key, bool] = {}
        self._running: dict[Key, float] = {}
        self._later: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._order = itertools.count()
        self._wakeup = asyncio.Event()
        self.last_progress = time.monotonic()

    def __len__(self) -> int:
        return len(self._dirty)

    def add(self, key: Key, *, urgent: bool = False) -> None:
        """Asks for a pass as soon as possible."""
        if key in self._dirty:
            if urgent and not self._dirty[key]:
                # It stays in the slow line too; `_pop` skips keys that are no longer dirty.
                self._dirty[key] = True
                self._enqueue(key)
            return
        if not self._dirty:
            self.last_progress = time.monotonic()
        self._dirty[key] = urgent
        if key not in self._running:
            self._enqueue(key)

    def add_after(self, key: Key, delay: float) -> None:
        """Asks for a pass after `delay` seconds; the earliest of several counts."""
        due = time.monotonic() + max(0.0, delay)
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        heapq.heappush(self._later, (due, next(self._order), key))
        self._wakeup.set()

    def failed(self, key: Key, *, at_least: float = 0.0) -> float:
        """Asks for another pass after a delay that doubles with each failure in a row. Returns the delay."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        delay = max(at_least, min(LAST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(count, 20)))
        self.add_after(key, delay)
        return delay

    def succeeded(self, key: Key) -> None:
        self._failures.pop(key, None)

    def forget(self, key: Key) -> None:
        """For an object that is gone: nothing about it is kept."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    async def get(self) -> Key:
        """The next key. The caller must call `done` after its pass."""
        while True:
            self._promote()
            key = self._pop()
            if key is not None:
                self._dirty.pop(key)
                self._running[key] = time.monotonic()
                return key
            await self._wait()

    def done(self, key: Key) -> None:
        self._running.pop(key, None)
        self.last_progress = time.monotonic()
        if key in self._dirty:
            self._enqueue(key)

    def stuck_for(self) -> float:
        """Seconds since the last finished pass while something waits; 0 when nothing waits."""
        return time.monotonic() - self.last_progress if self._dirty else 0.0

    def longest_pass(self) -> float:
        """Seconds that the oldest pass in progress has taken."""
        return time.monotonic() - min(self._running.values()) if self._running else 0.0

    def _enqueue(self, key: Key) -> None:
        (self._urgent if self._dirty[key] else self._normal).append(key)
        self._wakeup.set()

    def _pop(self) -> Key | None:
        for line in (self._urgent, self._normal):
            while line:
                key = line.popleft()
                if key in self._dirty and key not in self._running:
                    return key
        return None

    def _promote(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)

    async def _wait(self) -> None:
        self._wakeup.clear()
        timeout = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        try:
            await asyncio.wait_for(self._wakeup.wait(), timeout)
        except TimeoutError:
            return
        # Every waiting worker was woken: the one that finds nothing waits again.
