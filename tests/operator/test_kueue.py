"""Kueue's Workload tells why a job waits. The real API server has its kind here; a hand plays Kueue."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.world import World
from tests.support.api import Object, checked
from tests.support.wait import wait_for

from tuneward_operator.views import workload_view

NO_QUOTA = (
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor h100, 8 more needed"
)


def workload(conditions: dict[str, tuple[str, str]], **more: Any) -> Object:
    """`conditions`: type to (status, message)."""
    told = [{"type": kind, "status": status, "message": message} for kind, (status, message) in conditions.items()]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "bot-a1", "uid": "j", "controller": True}
    metadata = {"namespace": "team", "name": "job-bot-a1-x", "uid": "w", "resourceVersion": "7", "ownerReferences": [owner]}
    checks = {"admissionChecks": more.pop("checks")} if "checks" in more else {}
    return {"metadata": metadata, "spec": more, "status": {"conditions": told, **checks}}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (workload({}), ""),
        (workload({"QuotaReserved": ("False", NO_QUOTA)}), NO_QUOTA),
        (workload({"QuotaReserved": ("True", "ok"), "Admitted": ("True", "in")}), ""),
        (workload({"QuotaReserved": ("True", "ok"), "Admitted": ("False", "checks are pending")}), "checks are pending"),
        (
            workload(
                {"QuotaReserved": ("True", "ok")}, checks=[{"name": "dws", "message": "asked for nodes"}, {"name": "x"}]
            ),
            "dws: asked for nodes",
        ),
        (
            workload({}, active=False),
            "Workload job-bot-a1-x was deactivated; set its spec.active to true to let it in again",
        ),
    ],
)
def test_what_keeps_a_workload_out(item: Object, message: str) -> None:
    view = workload_view(item)
    assert (view.message, view.owner) == (message, ("team", "bot-a1"))


def kind_of_workloads(world: World) -> None:
    """No more of it than is read."""
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1beta2",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": free, "status": free}}},
        "subresources": {"status": {}},
    }
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "workloads.kueue.x-k8s.io",
            "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"},
        },
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": {"kind": "Workload", "plural": "workloads"},
            "versions": [version],
        },
    }
    answer = world.api.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=crd)
    assert answer.is_success or answer.status_code == 409, answer.text
    wait_for(lambda: world.api.get("/apis/kueue.x-k8s.io/v1beta2").is_success, what="Kueue's API", timeout=60)


@pytest.mark.cluster
def test_a_job_that_waits_in_a_queue_says_what_for(world: World) -> None:
    kind_of_workloads(world)
    world.operate()
    world.submit(labels={"kueue.x-k8s.io/queue-name": "gpus"})
    world.prepare_done()
    job = world.wait("Job", "bot-a1")
    world.wait_message("waiting for quota in queue gpus")
    made = workload({"QuotaReserved": ("False", NO_QUOTA)})
    made["metadata"] = {"name": "job-bot-a1-x", "ownerReferences": made["metadata"]["ownerReferences"]}
    made["metadata"]["ownerReferences"][0]["uid"] = job["metadata"]["uid"]
    where = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{world.namespace}/workloads"
    body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", **made}
    found = checked(world.api.post(where, json=body))
    checked(world.api.put(f"{where}/job-bot-a1-x/status", json={**found, "status": made["status"]}))
    world.wait_message(f"waiting for quota in queue gpus: {NO_QUOTA}")
