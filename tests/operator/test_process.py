"""The process itself: what it loads, its settings, its health."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from tuneward_operator import health
from tuneward_operator.logs import JsonFormatter
from tuneward_operator.settings import Settings, parse_command, settings_from


def test_the_operator_loads_no_torch() -> None:
    code = """
import pkgutil, sys, tuneward_operator
for module in pkgutil.iter_modules(tuneward_operator.__path__, "tuneward_operator."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
print(sorted({"torch", "transformers", "peft", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_default() -> None:
    environment = {"TUNEWARD_IMAGE_TRAINER": "from-env", "TUNEWARD_POLL_SECONDS": "2.5", "TUNEWARD_NAMESPACES": "a, b,"}
    found = settings_from({"image_trainer": "from-flag"}, environment)
    assert (found.image_trainer, found.poll_seconds, found.namespaces) == ("from-flag", 2.5, ("a", "b"))
    assert found.image_server == Settings().image_server


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--log-format", "xml"], "log_format is 'xml'; allowed: json, text"),
        (["--poll-seconds", "soon"], "poll_seconds is 'soon'; it must be a number"),
    ],
)
def test_a_wrong_setting_is_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(["run", *flags])
    assert said in capsys.readouterr().err


WELL: dict[str, Any] = {"silences": [("pods", 60.0)], "deaf": [], "stuck_for": 5.0, "longest_pass": 10.0, "lag": 0.1}


@pytest.mark.parametrize(
    ("ill", "sentence"),
    [
        ({}, ""),
        ({"silences": [("pods", 200.0)]}, "the watch of pods is silent for 200 s"),
        ({"deaf": ["finetunejobs"]}, "the watch of finetunejobs missed changes"),
        ({"stuck_for": 61.0}, "no pass has ended for 61 s while objects wait"),
        ({"longest_pass": 400.0}, "a pass has taken 400 s"),
        ({"lag": 6.0}, "the event loop was late by 6.0 s"),
    ],
)
async def test_livez_says_what_only_a_restart_heals(ill: dict[str, Any], sentence: str) -> None:
    found = health.ailments(**(WELL | ill))
    application = health.web_application(health.Metrics(), lambda: found, lambda: None)
    async with TestClient(TestServer(application)) as client:
        answer = await client.get("/livez")
        assert (answer.status, await answer.text()) == ((500, sentence) if sentence else (200, "ok"))


async def test_metrics_are_refreshed_when_they_are_read() -> None:
    metrics = health.Metrics()
    application = health.web_application(metrics, list, lambda: metrics.queue_depth.set(7))
    async with TestClient(TestServer(application)) as client:
        assert "tuneward_queue_depth 7.0" in await (await client.get("/metrics")).text()
        assert (await client.get("/healthz")).status == 200


def test_a_log_line_is_one_json_object_that_can_be_searched_by_job() -> None:
    record = logging.LogRecord("op", logging.INFO, "f", 1, "%s is %s", ("a/b", "Running"), None)
    record.namespace, record.name_, record.phase = "a", "b", "Running"
    found = json.loads(JsonFormatter().format(record))
    assert (found["message"], found["namespace"], found["name"], found["phase"]) == ("a/b is Running", "a", "b", "Running")
