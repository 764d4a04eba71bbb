"""Sessions of a rank in the test's own process, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.trainer.jobs import Job

from tuneward_trainer.distributed import Gang
from tuneward_trainer.progress import Reporter
from tuneward_trainer.session import Session, Stop, begin

CPU = torch.device("cpu")


class StopsAt(Reporter):
    """Asks to stop when a step is told."""

    def __init__(self, step: int | None, stop: Stop) -> None:
        super().__init__(None, 0)
        self._stop_at, self._stop = step, stop

    def update(self, **fields: Any) -> None:
        super().update(**fields)
        if fields.get("phase") == "Training" and fields.get("step") == self._stop_at:
            self._stop.ask()


@contextmanager
def sessions_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    """A rank's session in this process, of which it is the only one."""
    sessions: list[Session] = []

    def make(job: Job, *, ahead: bool, stop_at: int | None = None) -> Session:
        for name, value in job.variables().items():
            monkeypatch.setenv(name, value)
        stop = Stop()
        session = begin(job.plan, Gang(0, 1, CPU), stop, StopsAt(stop_at, stop))
        session.ahead = ahead
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        if session.log is not None:
            session.log.close()


def losses(job: Job) -> list[tuple[int, float]]:
    lines = (json.loads(line) for line in (job.run / "attempts/1/metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]
