"""What ranks leave and what their launcher serves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from tests.trainer.jobs import await_

from tuneward_trainer.progress import METRICS, Clock, Reporter, serve, stacks


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    server = serve(tmp_path, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(url: str) -> str:
    with urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def test_progress_is_served_before_any_rank_wrote(address: str) -> None:
    assert json.loads(get(f"{address}/progress"))["phase"] == "Starting"
    assert get(f"{address}/healthz") == "ok\n"
    assert "no rank" in get(f"{address}/stacks")


def test_the_leaders_progress_carries_the_step_of_each_rank(address: str, tmp_path: Path) -> None:
    Reporter(tmp_path, 0).update(phase="Training", attempt=2, step=7, steps=9, train_loss=1.5)
    Reporter(tmp_path, 1).update(phase="Training", step=6)
    progress = json.loads(get(f"{address}/progress"))
    assert (progress["attempt"], progress["step"], progress["trainLoss"]) == (2, 7, 1.5)
    assert progress["rankSteps"] == [7, 6]


def test_numbers_that_are_not_finite_are_left_out(address: str, tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, 0)
    reporter.update(train_loss=1.5)
    reporter.update(train_loss=math.nan)
    assert "trainLoss" not in json.loads(get(f"{address}/progress"))


def test_metrics_are_the_progress_for_prometheus(address: str, tmp_path: Path) -> None:
    Reporter(tmp_path, 0).update(step=7, steps=9, train_loss=1.5, tokens_per_second=10.0)
    text = get(f"{address}/metrics")
    assert "tuneward_step 7.0" in text
    assert "tuneward_train_loss 1.5" in text
    assert 'tuneward_rank_step{rank="0"} 7.0' in text
    assert "tuneward_validation_loss" not in text
    assert "tuneward_validation_loss" in METRICS


def test_an_unknown_path_is_not_found(address: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        get(f"{address}/nothing")


HANGS = """
import sys, threading
from pathlib import Path
from tuneward_trainer.progress import Reporter, dump_stacks_on_signal
dump_stacks_on_signal(Path(sys.argv[1]), 0)
Reporter(Path(sys.argv[1]), 0).update(step=1)
def waits_for_nobody():
    threading.Event().wait()
waits_for_nobody()
"""


def test_stacks_show_where_a_rank_hangs(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], env=os.environ)
    try:
        await_(lambda: (tmp_path / "rank-0.json").exists())
        await_(lambda: "waits_for_nobody" in stacks(tmp_path))
    finally:
        process.kill()
        process.wait()


def test_the_time_left_comes_from_recent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tuneward_trainer.progress.time.monotonic", lambda: now[0])
    clock = Clock(10)
    now[0] = 2.0
    assert clock.tick(1, 100) == {"step_seconds": 2.0, "tokens_per_second": 50.0, "eta_seconds": 18}
    now[0] = 50.0
    clock.reset()
    now[0] = 54.0
    assert clock.tick(2, 100)["eta_seconds"] == 24
