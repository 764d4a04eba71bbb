"""A tracker that is missing, crashes, hangs or is out of reach costs its figures and nothing else."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.trainer.jobs import await_, make_job
from tests.trainer.runs import JOINED, RETRAINED, attempt

from tuneward_trainer import trackers, tracking
from tuneward_trainer.progress import progress_of
from tuneward_trainer.trackers import Follower, Steps, UnusableError, Voice, follow
from tuneward_trainer.tracking import Tracking, states

HANGS = "import threading\nthreading.Event().wait()\n"
CRASHES = "import os\nos._exit(7)\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait of a tracker is one of the test's, and there is no end to what a hang may take but its deadline."""
    monkeypatch.setattr(trackers, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(trackers, "SEND_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "END_SECONDS", 4.0)


def test_what_ails_a_tracker_is_told_and_ends_with_it(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries, status = tmp_path / "libraries", tmp_path / "status"
    libraries.mkdir()
    status.mkdir()
    (libraries / "wandb.py").write_text(HANGS)
    (libraries / "mlflow.py").write_text(CRASHES)
    monkeypatch.setenv("PYTHONPATH", f"{libraries}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    job = make_job(
        tmp_path / "store", spec={"trackers": {"wandb": {}, "trackio": {}, "mlflow": {"trackingUri": "http://127.0.0.1:9"}}}
    )
    attempt(job.run, 1, 0, RETRAINED[1][1])
    (status / "rank-0.json").write_text(json.dumps({"attempt": 1, "step": 3, "steps": 9, "pid": 1}))
    found = Tracking.start(job.plan, job.plan_file, status, job.run)
    processes = found._processes
    await_(lambda: len(states(status)) == 1 and processes["mlflow"].poll() is not None)
    assert [state.name for state in progress_of(status).trackers] == ["trackio"]
    began = time.monotonic()
    ends = {state.name: state.message for state in found.end()}
    assert time.monotonic() - began < 8
    assert ends["mlflow"] == "its process ended with exit code 7"
    assert "pip install 'tuneward[trackio]'" in ends["trackio"]
    assert "ended after 4 s without an answer" in ends["wandb"]
    assert [process.poll() is None for process in processes.values()] == [False] * 3


def test_only_the_first_worker_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, spec={"trackers": {"wandb": {}}})
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert Tracking.start(job.plan, job.plan_file, tmp_path, job.run).end() == []


@dataclass
class Kept:
    """A tracker that keeps what it gets. It cannot be reached for the first `absent` times, and refuses `refused` times."""

    absent: int = 0
    refused: int = 0
    url: str = "http://tracker/run"
    steps: Steps = field(default_factory=list)
    finished: bool = False

    def open(self) -> Kept:
        self.absent -= 1
        if self.absent >= 0:
            raise ConnectionError("no route to tracker, key sesame-open")
        return self

    def send(self, steps: Steps) -> None:
        self.refused -= 1
        if self.refused >= 0:
            raise TimeoutError
        self.steps += steps

    def finish(self) -> None:
        self.finished = True


def following(run: Path, number: int, opened: Callable[[], Kept]) -> tuple[threading.Thread, threading.Event, list[str]]:
    said: list[str] = []
    voice, ending = Voice(run / "tracker-kept.json", "kept", said.append), threading.Event()
    thread = threading.Thread(target=follow, args=(run, number, voice, ending, opened))
    thread.start()
    return thread, ending, said


@pytest.mark.parametrize(("absent", "refused"), [(0, 0), (2, 0), (0, 2), (1, 3)])
def test_every_step_arrives_however_often_it_had_to_be_tried(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, absent: int, refused: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    for number, (first, lines) in RETRAINED.items():
        attempt(tmp_path, number, first, lines)
    kept = Kept(absent, refused)
    thread, ending, said = following(tmp_path, 3, kept.open)
    await_(lambda: bool(kept.steps))
    ending.set()
    thread.join(30)
    assert kept.finished
    assert {step: round(values["train/loss"], 3) for step, values in kept.steps if "train/loss" in values} == JOINED
    assert len(kept.steps) == len(JOINED) + 2
    state = json.loads((tmp_path / "tracker-kept.json").read_text())
    assert (state["url"], state.get("message", "")) == ("http://tracker/run", "")
    # Each trouble is one line, however often it was tried, and a key is in none.
    assert len(said) == bool(absent) + bool(refused)
    assert "sesame" not in "".join(said)


def test_what_cannot_help_is_not_tried_again(tmp_path: Path, impatient: None) -> None:
    attempt(tmp_path, 1, 0, RETRAINED[1][1])

    def refuse() -> Kept:
        raise UnusableError("set a key")

    with pytest.raises(UnusableError, match="set a key"):
        follow(tmp_path, 1, Voice(tmp_path / "tracker-kept.json", "kept", print), threading.Event(), refuse)


def test_a_line_is_read_once_and_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)
    assert list(follower.lines()) == []
    file.write_text('{"step": 1}\n{"step"')
    assert list(follower.lines()) == [{"step": 1}]
    with file.open("a") as stream:
        stream.write(": 2}\n")
    assert list(follower.lines()) == [{"step": 2}]


def test_a_tracker_that_says_nothing_is_said_to_hang(tmp_path: Path) -> None:
    file = tmp_path / "tracker-wandb.json"
    file.write_text(json.dumps({"name": "wandb", "url": "http://run", "message": "", "at": time.time() - 200}))
    assert [state.message for state in states(tmp_path)] == ["no word from it for 3 min; it may hang"]
