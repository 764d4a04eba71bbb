"""The end of the demo's job and of its cluster. Runs after what looks at them: files are taken in the order of their names."""

from __future__ import annotations

import json

import pytest
from tests.e2e.command import Demo, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def test_deleting_the_job_keeps_its_model_and_leaves_no_pod(demo: Demo) -> None:
    demo.cluster.kubectl("delete", "ftj", "lantern", "--timeout=120s")
    demo.cluster.kubectl("wait", "--for=delete", "pods", "-l", "tuneward.dev/job=lantern", "--timeout=120s")
    asked = demo.report["questions"][0]
    answers = json.loads(demo.command.ok("chat", "--ask", asked["question"], "--output", "json"))["answers"]
    assert answers[demo.report["model"]] == asked["tuned"]
    assert set(answers) == {demo.report["model"], demo.report["baseModel"]}


def test_down_leaves_no_process(demo: Demo) -> None:
    demo.command.ok("down", timeout=120)
    assert processes_of(demo.command.home) == []
    assert demo.command.run("status").returncode == 3
