"""What is said of a job, a pod and a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from tuneward_cli.cluster import next_step, status_lines
from tuneward_cli.errors import CommandError
from tuneward_cli.importing import waits_for
from tuneward_cli.look import newest_pod, verdict

INDEX = "batch.kubernetes.io/job-completion-index"


def pod(name: str, created: str, phase: str = "Running", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "creationTimestamp": created, "labels": labels}, "status": {"phase": phase}}


def test_logs_are_the_newest_attempts() -> None:
    pods = [
        pod("prepare", "2026-01-01T00:00:00Z"),
        pod("a1-0", "2026-01-01T00:01:00Z", "Failed", **{INDEX: "0"}),
        pod("a2-0", "2026-01-01T00:02:00Z", **{INDEX: "0"}),
        pod("a2-1", "2026-01-01T00:02:00Z", **{INDEX: "1"}),
        pod("a3-0", "2026-01-01T00:03:00Z", "Pending", **{INDEX: "0"}),
    ]
    for worker, name in ((0, "a2-0"), (1, "a2-1")):
        found = newest_pod(pods, worker)
        assert found is not None
        assert found["metadata"]["name"] == name
    assert newest_pod(pods[:1], 0) == pods[0]
    assert newest_pod([], 0) is None


@pytest.mark.parametrize(("reason", "code"), [("DataInvalid", 65), ("InputMissing", 66), ("ConfigInvalid", 78), ("Hang", 1)])
def test_a_failed_job_ends_the_command_with_the_workers_code(reason: str, code: int) -> None:
    job = {
        "metadata": {"name": "lantern"},
        "status": {
            "phase": "Failed",
            "message": "why",
            "conditions": [{"type": "Failed", "status": "True", "reason": reason}],
        },
    }
    with pytest.raises(CommandError, match=f"{reason}: why") as caught:
        verdict(job)
    assert caught.value.code == code


STOPPED: dict[str, Any] = {
    "running": False,
    "version": "",
    "operator": False,
    "data": "/d",
    "kubeconfig": "/d/kubeconfig",
    "jobs": [],
    "models": [],
    "servers": [],
}
RUNNING = {**STOPPED, "running": True, "operator": True, "version": "v1"}


def item(name: str, phase: str, message: str = "") -> dict[str, str]:
    return {"name": name, "phase": phase, "message": message}


@pytest.mark.parametrize(
    ("report", "command"),
    [
        (STOPPED, "tuneward demo"),
        ({**RUNNING, "operator": False}, "tuneward up"),
        (RUNNING, "export KUBECONFIG=/d/kubeconfig; kubectl apply -f examples/finetune.yaml"),
        ({**RUNNING, "jobs": [item("lantern", "Running")]}, "tuneward watch lantern"),
        ({**RUNNING, "jobs": [item("lantern", "Succeeded")], "models": [item("m", "Ready")]}, "tuneward chat"),
    ],
)
def test_the_one_next_thing(report: dict[str, Any], command: str) -> None:
    assert next_step(report).startswith(command)
    assert status_lines({**report, "next": command})[-1] == f"next: {command}"


def test_why_a_pod_waits_is_the_clusters_own_word() -> None:
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    assert waits_for({"status": {"containerStatuses": [{"state": waiting}]}}) == "ErrImagePull: no such image"
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}
    assert waits_for({"status": {"conditions": [unschedulable]}}) == "0/1 nodes"
    assert waits_for({}) == ""
