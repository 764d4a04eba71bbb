"""Progress of running gangs, pulled from their leaders on a budget.

Only the leader is asked, each at most every `poll_seconds` and all together at most `poll_rate` times a second. What it
says goes onto the board, which passes read; a pass is asked for only when what was said can change status. No answer is
never taken for a hang: policies and proxies can block the way.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol

import aiohttp

from tuneward_api.files import Progress
from tuneward_api.names import TRAINER_PORT
from tuneward_operator.tolerant import tolerant

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0


class Leader(NamedTuple):
    """Whom to ask."""

    namespace: str
    job: str
    pod: str
    uid: str
    ip: str


@dataclass(frozen=True)
class Heard:
    """The last answer of a leader, when it came, and since when its phase and step have been the same."""

    progress: Progress
    at: datetime
    moved_at: datetime


@dataclass
class Board:
    """The last answers, by the uid of the leader's pod."""

    heard: dict[str, Heard] = field(default_factory=dict)

    def of(self, pod_uid: str) -> Heard | None:
        return self.heard.get(pod_uid)

    def post(self, pod_uid: str, progress: Progress, at: datetime) -> bool:
        """Returns whether it says something that status may have to say too."""
        known = self.heard.get(pod_uid)
        moved = known is None or _place(known.progress) != _place(progress)
        self.heard[pod_uid] = Heard(progress, at, at if moved or known is None else known.moved_at)
        return known is None or _noteworthy(known.progress, progress)

    def retain(self, pod_uids: set[str]) -> None:
        for gone in self.heard.keys() - pod_uids:
            del self.heard[gone]


def _place(progress: Progress) -> tuple[int, str, int]:
    return progress.attempt, progress.phase, progress.step


def _noteworthy(before: Progress, after: Progress) -> bool:
    """A new phase, number, checkpoint or word of a tracker, or one percent more; the rest waits for the clock's pass."""
    same = (before.attempt, before.phase, before.steps, before.checkpoint, before.trackers)
    if same != (after.attempt, after.phase, after.steps, after.checkpoint, after.trackers):
        return True
    return bool(after.steps) and before.step * 100 // after.steps != after.step * 100 // after.steps


class Pull(Protocol):
    """GET from a pod's address. Raises one of PULL_ERRORS."""

    async def __call__(self, ip: str, port: int, path: str) -> bytes: ...


PULL_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)


def pull_directly(session: aiohttp.ClientSession) -> Pull:
    """`session` must not trust proxies from the environment: they know nothing of pods."""

    async def pull(ip: str, port: int, path: str) -> bytes:
        host = f"[{ip}]" if ":" in ip else ip
        async with session.get(f"http://{host}:{port}{path}") as answer:
            answer.raise_for_status()
            return await answer.read()

    return pull


class Poller:
    """`leaders` gives whom to ask now; `news` hears of answers that matter; `told` counts (answered or not)."""

    def __init__(
        self,
        board: Board,
        pull: Pull,
        leaders: Callable[[], Iterable[Leader]],
        news: Callable[[Leader], None],
        told: Callable[[bool], None],
        now: Callable[[], datetime],
        *,
        every: float,
        rate: float,
    ) -> None:
        self._board = board
        self._pull = pull
        self._leaders = leaders
        self._news = news
        self._told = told
        self._now = now
        self._every = every
        self._rate = rate

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.round()
            await asyncio.sleep(max(0.05, self._every - (loop.time() - began)))

    async def round(self) -> None:
        """Asks every leader once, spread out so that the budget holds."""
        async with asyncio.TaskGroup() as group:
            for leader in list(self._leaders()):
                group.create_task(self._one(leader))
                await asyncio.sleep(1.0 / self._rate)

    async def _one(self, leader: Leader) -> None:
        try:
            answer = await self._pull(leader.ip, TRAINER_PORT, "/progress")
            # Not orjson: a foreign trainer may say NaN, and only that number shall be lost.
            progress = tolerant(Progress, json.loads(answer))
        except (*PULL_ERRORS, ValueError) as error:
            logger.debug("no progress from %s/%s: %s", leader.namespace, leader.pod, error)
            self._told(False)
            return
        self._told(True)
        # A pod of another job may have got the address of one that has just gone.
        if progress.pod_uid in ("", leader.uid) and self._board.post(leader.uid, progress, self._now()):
            self._news(leader)
