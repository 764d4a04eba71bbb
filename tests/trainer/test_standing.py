"""A gang that makes no steps by right is ended where it does nothing at all, and only there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.wait import wait_for

from tuneward_trainer import standing
from tuneward_trainer.standing import watched

STILL = "import time\ntime.sleep(1000)"
BUSY = "while True: pass"


@contextmanager
def rank(folder: Path, number: int, program: str = STILL, **said: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a rank's place, which has said this."""
    process = subprocess.Popen([sys.executable, "-S", "-c", program])
    body = {"pid": process.pid, "phase": "Loading", "step": 0, "attempt": 1, **said}
    (folder / f"rank-{number}.json").write_text(json.dumps(body))
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


def test_ranks_that_stand_still_are_ended_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where that does not end the launcher either, as its volume does not answer, it is told to leave."""
    monkeypatch.setattr(standing, "stacks", lambda _: "in read()")
    monkeypatch.setattr(standing, "_CONCLUDE_SECONDS", 0.1)
    left: list[str] = []
    with rank(tmp_path, 0, phase="Evaluating", step=7) as first, rank(tmp_path, 1, phase="Evaluating", step=7) as second:
        with watched(tmp_path, 2, 1.5, left.append):
            wait_for(lambda: left, what="the end", timeout=60)
        assert [process.wait(timeout=30) for process in (first, second)] == [-9, -9]
    ending = json.loads((tmp_path / "ending-0.json").read_text())
    assert (ending["reason"], ending["exit_code"], ending["secondary"]) == ("Hang", 75, False)
    assert left == [ending["message"]]
    assert left[0].startswith("the ranks evaluated and stood still for 1.5 s after step 7; see whether the store's volume ")


@pytest.mark.parametrize(
    ("ranks", "others"),
    [
        (2, {"program": BUSY}),  # one works, and the other waits for it
        (2, {"phase": "Training"}),  # whose steps are looked at from outside
        (3, {}),  # one has said nothing yet
    ],
)
def test_others_are_left_alone(tmp_path: Path, ranks: int, others: dict[str, Any]) -> None:
    with rank(tmp_path, 0) as first, rank(tmp_path, 1, **others) as second:
        with watched(tmp_path, ranks, 0.4, lambda _: None), pytest.raises(subprocess.TimeoutExpired):
            first.wait(timeout=1.2)
        assert (first.poll(), second.poll()) == (None, None)
    assert not (tmp_path / "ending-0.json").exists()
