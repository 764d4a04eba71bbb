"""Ctrl-C in the middle of the demo leaves no process, and the demo can be run again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.command import Command, processes_of
from tests.support.cluster import ROOT
from tests.support.wait import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("moment", ["… local Kubernetes", "… model server"])
def test_ctrl_c_leaves_nothing_behind(fresh: Path, moment: str) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "tuneward_cli", "demo", "--no-prompt"],
        cwd=ROOT,
        env=Command(fresh).environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert demo.stdout is not None
    said = []
    for line in demo.stdout:
        said.append(line)
        if line.startswith(moment):
            break
    demo.send_signal(signal.SIGINT)
    rest, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, "".join(said) + rest
    assert "the cluster was taken down" in rest
    assert "next: tuneward demo" in rest
    wait_for(lambda: not processes_of(fresh), what="every process to end", timeout=20)
