"""What stands still is ended with a sentence; what works, or waits for something that goes on, is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.wait import wait_for
from tests.trainer.jobs import make_job

from tuneward_api.files import FinishReport
from tuneward_trainer.__main__ import _say_that_it_hung, parser

DEADLINE = 60

PROGRAM = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
from tuneward_api.finetunejob import RunPolicy
from tuneward_trainer.supervise import supervised, tell

def held():
    print(subprocess.Popen(["sleep", "1000"]).pid, flush=True)
    ctypes.PyDLL(None).pause()  # keeps the interpreter's lock: no thread of it runs any more

def told():
    for _ in range(60):
        time.sleep(0.1)
        tell()
    return 7

def busy():
    for _ in range(60):
        time.sleep(0.1)
        sum(range(500_000))
    return 7

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def stopped():
    print("ready", flush=True)
    try:
        threading.Event().wait()
    finally:
        print("unwound", flush=True)

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
policy = RunPolicy.model_construct(hang_timeout_seconds=float(sys.argv[2]))
sys.exit(supervised("prepare", globals()[sys.argv[1]], Path(sys.argv[3]).write_text, policy))
"""


@contextmanager
def running(folder: Path, work: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, work, str(seconds), str(folder / "said")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def test_what_stands_still_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    with running(tmp_path, "held", 1.5) as process:
        output, log = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75
    assert "in held" in log
    assert (tmp_path / "said").read_text() == (
        "prepare stood still for 1.5 s and was ended; see whether the store's volume and the network answer, and raise "
        "spec.runPolicy.hangTimeoutSeconds if they are only slow (its log says where it stood)"
    )
    started = Path("/proc") / output.split()[0]
    wait_for(lambda: gone(started), what="the end of what it started", timeout=DEADLINE)


def gone(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("work", "code"), [("told", 7), ("busy", 7), ("killed", 137)])
def test_what_goes_on_ends_as_it_ends(tmp_path: Path, work: str, code: int) -> None:
    with running(tmp_path, work, 3) as process:
        process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert not (tmp_path / "said").exists()


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_reaches_the_work_once(tmp_path: Path, *, whole_group: bool) -> None:
    with running(tmp_path, "stopped", 1000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        rest, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, rest) == (143, "unwound\n")


def test_the_work_ends_with_who_watches_it(tmp_path: Path) -> None:
    with running(tmp_path, "stopped", 1000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # The child holds the other end.
        assert process.communicate(timeout=DEADLINE)[0] == ""


def test_a_command_of_a_job_takes_its_deadline(tmp_path: Path) -> None:
    """A read that never returns, as of a store that is away: here of a named pipe without a writer."""
    job = make_job(tmp_path, spec={"runPolicy": {"hangTimeoutSeconds": 10}})
    (job.run / "attempts/1").mkdir(parents=True)
    os.mkfifo(job.run / "attempts/1/result.json")
    command = [sys.executable, "-m", "tuneward_trainer", "finish", "--plan", str(job.plan_file)]
    environment = {**os.environ, **job.variables(), "TUNEWARD_TERMINATION_LOG": str(tmp_path / "said")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 75, done.stderr
    assert "in terminal_result" in done.stderr
    said = FinishReport.model_validate_json((tmp_path / "said").read_bytes())
    assert (said.reason, said.message.partition(" and ")[0]) == ("Hang", "finish stood still for 10 s")


def test_a_check_that_stood_still_says_so_to_programs_too(capsys: pytest.CaptureFixture[str]) -> None:
    _say_that_it_hung(parser().parse_args(["validate", "--model", "m", "a.jsonl", "--output", "json"]), "it stood still")
    found = capsys.readouterr()
    assert json.loads(found.out) == {"valid": False, "reason": "Hang", "message": "it stood still"}
    assert found.err == "it stood still\n"
