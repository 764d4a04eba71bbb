"""A store that one node at a time can mount: everything that uses it goes where it is, by the real scheduler."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.pictures import SETTINGS, owner, plan
from tests.operator.world import World
from tests.support.api import Object, checked, merge
from tests.support.wait import wait_for

from tuneward_operator import build


def store_on_one_node(world: World) -> None:
    """The namespace's store, bound."""
    name = f"volume-{world.namespace}"
    common = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {**common, "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/nowhere"}},
    }
    assert world.api.post("/api/v1/persistentvolumes", json=volume).is_success
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "tuneward-store"},
        "spec": {**common, "volumeName": name, "resources": {"requests": {"storage": "1Gi"}}},
    }
    world.create(claim)
    wait_for(lambda: world.get("PersistentVolumeClaim", "tuneward-store")["status"]["phase"] == "Bound", what="the store")


def node(world: World, number: int) -> str:
    """A node that only pods with this test's toleration may use."""
    name = f"{world.namespace}-{number}"
    taint = {"key": "tuneward.test/only", "value": world.namespace, "effect": "NoSchedule"}
    labels = {"kubernetes.io/hostname": name}
    made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": {"taints": [taint]}}
    checked(world.api.post("/api/v1/nodes", json=made))
    room = {"cpu": "64", "memory": "256Gi", "pods": "100"}
    ready = {"type": "Ready", "status": "True"}
    merge(
        world.api, f"/api/v1/nodes/{name}/status", {"status": {"allocatable": room, "capacity": room, "conditions": [ready]}}
    )
    return name


def node_of(world: World, job: str) -> str:
    """Where the scheduler put the Job's pod. Raises AssertionError with why it did not."""
    said: list[object] = []

    def bound() -> str | None:
        (pod,) = world.pods_of(job)
        said[:] = [pod["status"].get("conditions")]
        found: str | None = pod["spec"].get("nodeName")
        return found

    try:
        return wait_for(bound, what=f"a node for {job}", timeout=30)
    except AssertionError as error:
        raise AssertionError(f"{error}: {said}") from None


def test_all_that_uses_it_goes_to_one_node(world: World) -> None:
    store_on_one_node(world)
    nodes = [node(world, number) for number in range(4)]
    tolerations = [{"key": "tuneward.test/only", "operator": "Equal", "value": world.namespace}]
    try:
        world.share_operator()
        for job in ("bot", "second", "third", "fourth"):
            world.submit(job, workers={"gpusPerWorker": 0, "tolerations": tolerations})
        (place,) = {node_of(world, f"{job}-prepare") for job in ("bot", "second", "third", "fourth")}
        world.prepare_done()
        assert node_of(world, "bot-a1") == place
    finally:
        for name in nodes:
            world.api.delete(f"/api/v1/nodes/{name}")


def affinity(job: Object) -> object:
    return job["spec"]["template"]["spec"].get("affinity")


def test_only_such_a_store_holds_its_pods_together() -> None:
    free = owner(workers={"gpusPerWorker": 0, "nodeSelector": {"disk": "fast"}})
    held = replace(free, one_node=True)
    jobs = [build.prepare_job(held, plan(held).request, SETTINGS), build.attempt_job(held, plan(held), 1, SETTINGS)]
    term = {
        "labelSelector": {"matchLabels": {"tuneward.dev/store": "tuneward-store"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    for job in jobs:
        assert affinity(job) == {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
        assert job["spec"]["template"]["metadata"]["labels"]["tuneward.dev/store"] == "tuneward-store"
        assert job["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "fast"}
    assert affinity(build.attempt_job(free, plan(free), 1, SETTINGS)) is None
    assert "nodeSelector" not in build.prepare_job(free, plan(free).request, SETTINGS)["spec"]["template"]["spec"]
