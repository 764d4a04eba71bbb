"""The demo in an ordinary container, which may make no namespace and no mount."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.e2e.command import Command
from tests.support.cluster import SANDBOX

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_demos_job_ends_in_a_model_that_answers(fresh: Path) -> None:
    command = Command(fresh, within=(sys.executable, str(SANDBOX)))
    done = command.run("demo", "--no-prompt", "--output", "json", timeout=1700)
    assert done.returncode == 0, done.stderr
    assert json.loads((fresh / "ready").read_text())["way"] == "notify"
    report = json.loads(done.stdout)
    assert report["score"]["base"] == 0
    assert report["score"]["tuned"] >= 8, report["questions"]
