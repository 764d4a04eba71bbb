"""What a job reads from and is not there is waited for, with a sentence, and no pod is made that could only hang."""

from __future__ import annotations

import pytest
from tests.operator.pictures import owner
from tests.operator.world import World

from tuneward_operator import inputs


def test_each_is_named_by_its_field() -> None:
    of = owner(
        model={"uri": "pvc://models/tiny"},
        datasets={
            "training": [{"uri": "configmap://chats/a.jsonl"}, {"uri": "pvc://data/b.jsonl"}],
            "validation": [{"uri": "configmap://chats/c.jsonl"}, {"uri": "configmap://held-out/d.jsonl"}],
        },
    )
    found = [*inputs.inputs_of(of.spec, None)]
    assert [(one.field, str(one.uri)) for one in found] == [
        ("spec.model.uri", "pvc://models/tiny"),
        ("spec.datasets.training[0].uri", "configmap://chats/a.jsonl"),
        ("spec.datasets.training[1].uri", "pvc://data/b.jsonl"),
        ("spec.datasets.validation[0].uri", "configmap://chats/c.jsonl"),
        ("spec.datasets.validation[1].uri", "configmap://held-out/d.jsonl"),
    ]
    assert inputs.configmaps(found) == {
        "chats": "spec.datasets.training[0].uri",
        "held-out": "spec.datasets.validation[1].uri",
    }
    # The operator makes the store's claim, or says that a named one is missing.
    assert inputs.missing_claim(found, "models", {"data"}) == ""
    assert inputs.missing_claim(found, "tuneward-store", {"models"}) == (
        "PersistentVolumeClaim data (spec.datasets.training[1].uri) does not exist in this namespace; create it"
    )


@pytest.mark.cluster
def test_a_job_waits_for_its_claim_and_its_configmap_and_says_so(world: World) -> None:
    """A pod that mounts what is not there waits for ever, and only its events would say why."""
    world.share_operator()
    datasets = {"training": [{"uri": "configmap://later/chats.jsonl"}, {"uri": "pvc://data/chats.jsonl"}]}
    world.submit(datasets=datasets)
    status = world.wait_phase("Pending")
    assert status["message"].startswith("PersistentVolumeClaim data (spec.datasets.training[1].uri) does not exist")
    assert world.condition("Stalled")["reason"] == "InputMissing"
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    world.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim})
    # Any change of the job is a new look; by itself it would be one within 10 s.
    world.look_again()
    world.wait_message("ConfigMap later (spec.datasets.training[0].uri) does not exist in this namespace; create it")
    assert world.find("Job", "bot-prepare") is None
    world.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"chats.jsonl": "{}"}})
    world.look_again()
    world.wait("Job", "bot-prepare")
    world.wait_phase("Validating")
