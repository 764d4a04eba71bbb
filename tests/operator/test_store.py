"""A store that one node at a time can mount: everything that uses it goes where it is, by the real scheduler."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.pictures import SETTINGS, owner, plan
from tests.operator.world import World
from tests.support.api import Object, checked, merge
from tests.support.wait import wait_for

from tuneward_operator import build, inputs


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
    held = replace(free, held=("tuneward-store",), gang_held="tuneward-store")
    jobs = [build.prepare_job(held, plan(held).request, SETTINGS), build.attempt_job(held, plan(held), 1, SETTINGS)]
    term = {
        "labelSelector": {"matchLabels": {"claim.tuneward.dev/tuneward-store": ""}},
        "topologyKey": "kubernetes.io/hostname",
    }
    for job in jobs:
        assert affinity(job) == {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
        assert job["spec"]["template"]["metadata"]["labels"]["claim.tuneward.dev/tuneward-store"] == ""
        assert job["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "fast"}
    assert affinity(build.attempt_job(free, plan(free), 1, SETTINGS)) is None
    assert "nodeSelector" not in build.prepare_job(free, plan(free).request, SETTINGS)["spec"]["template"]["spec"]


def test_other_claims_hold_the_pods_that_mount_them() -> None:
    """A model's claim all of them, a data set's claim prepare alone; the term is of the first, the labels are of all."""
    of = owner(
        model={"uri": "pvc://models/tiny"},
        datasets={"training": [{"uri": "pvc://chats/chats.jsonl"}]},
        workers={"gpusPerWorker": 0, "nodeSelector": {"disk": "fast"}},
    )
    sources = [*inputs.inputs_of(of.spec, None)]
    assert inputs.claims(sources, of.store_claim) == ("tuneward-store", "models", "chats")
    assert inputs.of_gang(("models", "chats"), sources, of.store_claim) == "models"
    assert inputs.of_gang(("chats",), sources, of.store_claim) == ""
    held = replace(of, held=("models", "chats"), gang_held="models")
    whole = plan(held)
    moved = whole.prepared.base.model_copy(update={"claim": "models"})
    whole = whole.model_copy(update={"prepared": whole.prepared.model_copy(update={"base": moved})})
    prepare = build.prepare_job(held, whole.request, SETTINGS)
    found = {
        role: claims_of(job)
        for role, job in {
            "prepare": prepare,
            "attempt": build.attempt_job(held, whole, 1, SETTINGS),
            "finish": build.finish_job(held, whole, SETTINGS),
        }.items()
    }
    assert found == {"prepare": (["models"], ["chats", "models"]), "attempt": (["models"], ["models"]), "finish": ([], [])}
    assert prepare["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "fast"}
    alone = build.prepare_job(replace(of, held=("chats",)), whole.request, SETTINGS)
    assert claims_of(alone) == (["chats"], ["chats"])
    assert "nodeSelector" not in alone["spec"]["template"]["spec"]


def claims_of(job: Object) -> tuple[list[str], list[str]]:
    """(of its affinity's term, of its labels)"""
    template, prefix = job["spec"]["template"], "claim.tuneward.dev/"
    terms = template["spec"].get("affinity", {}).get("podAffinity", {})
    matched = [
        label
        for term in terms.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        for label in term["labelSelector"]["matchLabels"]
    ]
    labels = [label for label in template["metadata"]["labels"] if label.startswith(prefix)]
    return [label.removeprefix(prefix) for label in matched], sorted(label.removeprefix(prefix) for label in labels)
