"""The life of a job on the real API server, from apply to a registered model."""

from __future__ import annotations

import pytest
from tests.operator.world import DIGEST, World, result, saved
from tests.support.wait import wait_for

pytestmark = pytest.mark.cluster


def test_a_job_ends_in_a_registered_model(world: World) -> None:
    world.share_operator()
    world.submit(serve={"server": "assistant"})
    world.wait("Job", "bot-prepare")
    world.wait_phase("Validating")
    assert world.get("PersistentVolumeClaim", "tuneward-store")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert world.get("ConfigMap", "bot-request")["immutable"] is True

    world.prepare_done()
    (pod,) = world.pods_of("bot-a1")
    status = world.wait_phase("Starting")
    assert status["resolved"]["images"] == {"trainer": "trainer:1"}
    assert world.condition("Accepted")["status"] == "True"

    leader = world.leader(pod, attempt=1, step=10, trainLoss=2.5, etaSeconds=90)
    world.wait_phase("Running")
    status = wait_for(lambda: (s := world.status()) and s.get("progress") and s, what="progress")
    assert status["progress"]["summary"] == "10/100"
    assert (status["progress"]["loss"], status["progress"]["eta"]) == ("2.500", "1m30s")
    leader.progress |= {"step": 20, "checkpoint": saved(20)}
    wait_for(lambda: world.status().get("checkpoint", {}).get("step") == 20, what="the checkpoint in status")

    world.ends(pod, 0, result(pod, 1))
    world.wait("Job", "bot-finish")
    world.finish_done()
    status = world.wait_phase("Succeeded")
    assert status["model"]["name"] == "bot-abababab"
    assert (status["attemptCount"], status["launches"], status["progress"]["percent"]) == (1, 1, 100)
    for kind, truth in {"Complete": "True", "Finished": "True", "Failed": "False", "Stalled": "False"}.items():
        assert world.condition(kind)["status"] == truth
    wait_for(lambda: world.condition("Served")["reason"] == "ServerMissing", what="the model's word on its server")
    model = world.get("FineTunedModel", "bot-abababab")
    assert model["metadata"]["labels"]["tuneward.dev/server"] == "assistant"
    assert "ownerReferences" not in model["metadata"]
    assert model["spec"]["artifact"]["uri"] == f"pvc://tuneward-store/adapters/sha256-{DIGEST[7:]}"
    reasons = [event["reason"] for event in world.list("Event") if event["involvedObject"]["kind"] == "FineTuneJob"]
    assert {"Validating", "WaitingForPods", "Training", "Registering", "Succeeded"} <= set(reasons)


def test_refused_data_is_one_sentence_and_no_attempt(world: World) -> None:
    world.share_operator()
    world.submit()
    (pod,) = world.pods_of("bot-prepare")
    message = "chats.jsonl:3: messages[0].role is 'usr'; allowed: system, user, assistant, tool"
    world.ends(pod, 65, {"outcome": "Failed", "reason": "DataInvalid", "message": message})
    status = world.wait_phase("Failed")
    assert status["message"] == message
    assert world.condition("Failed")["reason"] == "DataInvalid"
    assert world.condition("Accepted")["status"] == "False"
    assert world.condition("Finished")["status"] == "True"
    assert world.find("Job", "bot-a1") is None
