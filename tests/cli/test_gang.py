"""A gang on a workstation that answers and makes no step is ended, as on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import pytest
from tests.operator.world import Leader
from tests.support.wait import wait_for

from tuneward_api.names import TRAINER_PORT
from tuneward_cli.gang import Gang, HangError
from tuneward_cli.words import Seen


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[tuple[Gang, Leader]]:
    leader = Leader("", {"attempt": 1, "step": 3})
    client = httpx.Client(base_url=f"http://{leader.ip}:{TRAINER_PORT}", timeout=5, trust_env=False)
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    found = Gang(process=process, address=leader.ip, last_words=tmp_path / "said", client=client)
    yield found, leader
    found.close(grace=5)
    leader.close()
    assert process.returncode is not None


def test_no_step_for_too_long_is_a_hang(gang: tuple[Gang, Leader]) -> None:
    steps: list[int] = []

    def seen(found: Seen | None) -> None:
        """Makes steps at first."""
        if found is not None:
            steps.append(found.step)
            gang[1].progress["step"] = min(5, found.step + 1)

    with pytest.raises(HangError) as caught:
        gang[0].watch(seen, hang_seconds=2)
    assert caught.value.step == 5
    assert list(dict.fromkeys(steps)) == [3, 4, 5]


def test_one_that_evaluates_is_busy(gang: tuple[Gang, Leader]) -> None:
    gang[1].progress["phase"] = "Evaluating"
    looks = 0

    def seen(found: Seen | None) -> None:
        nonlocal looks
        looks += 1
        if looks == 6:
            gang[0].process.kill()

    assert gang[0].watch(seen, hang_seconds=1) == (-9, None)


def test_ctrl_c_again_gives_up_on_what_is_being_saved(tmp_path: Path) -> None:
    begun, told = tmp_path / "begun", tmp_path / "told"
    saves = f"trap 'touch {told}' TERM; touch {begun}; while :; do sleep 0.1; done"
    process = subprocess.Popen(["sh", "-c", saves], start_new_session=True)
    gang = Gang(process=process, address="", last_words=tmp_path / "said", client=httpx.Client())
    wait_for(begun.exists, what="a process that hears SIGTERM")

    def press() -> None:
        wait_for(told.exists, what="the first Ctrl-C's SIGTERM")
        os.kill(os.getpid(), signal.SIGINT)

    person = Thread(target=press, daemon=True)
    person.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gang.close(grace=60)
        person.join(timeout=60)
        assert process.returncode == -signal.SIGKILL
    finally:
        process.kill()
