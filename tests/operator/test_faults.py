"""Faults made for real, against the real API server: lost workers, and hands that delete, suspend and cancel."""

from __future__ import annotations

import pytest
from tests.operator.test_served import model
from tests.operator.world import World, result, running, saved
from tests.support.wait import wait_for

pytestmark = pytest.mark.cluster


def test_a_lost_worker_restarts_the_whole_gang_until_the_budget_is_spent(world: World) -> None:
    world.share_operator()
    world.submit(workers={"replicas": 2, "gpusPerWorker": 0}, runPolicy={"retries": {"infrastructure": 1}}, suspend=False)
    world.prepare_done()
    leader, other = world.pods_of("bot-a1", 2)
    world.leader(leader, attempt=1, step=30, checkpoint=saved(20))
    world.runs(other)
    world.wait_phase("Running")
    wait_for(lambda: world.status().get("checkpoint"), what="the checkpoint in status")
    world.ends(other, 137)

    pods = world.pods_of("bot-a2", 2)
    assert world.find("Job", "bot-a1") is None
    status = world.wait_phase("Starting")
    assert (status["launches"], status["retries"]) == (1, {"Infrastructure": 1})
    (attempt,) = status["attempts"]
    assert (attempt["lastStep"], attempt["lostSteps"]) == (30, 10)
    assert attempt["cause"] == "worker 1: a worker was killed (SIGKILL)"

    world.ends(pods[0], 137)
    status = world.wait_phase("Failed")
    assert world.condition("Failed")["reason"] == "RetriesExhausted"
    assert "spec.runPolicy.retries" in status["message"]
    assert world.find("Job", "bot-a3") is None


def test_a_gang_that_makes_no_step_is_taken_down_and_goes_on(world: World) -> None:
    world.share_operator()
    world.submit(runPolicy={"hangTimeoutSeconds": 10})
    world.prepare_done()
    (leader,) = world.pods_of("bot-a1")
    world.leader(leader, attempt=1, step=30, checkpoint=saved(20))
    world.pods_of("bot-a2")
    world.wait_gone("Job", "bot-a1")
    status = world.status()
    assert status["retries"] == {"Hang": 1}
    (attempt,) = status["attempts"]
    assert attempt["cause"].startswith("no step for 10 s after step 30")


def test_suspend_frees_the_workers_and_resume_goes_on_with_the_next_launch(world: World) -> None:
    world.share_operator()
    world.submit()
    running(world)
    world.patch("FineTuneJob", "bot", {"spec": {"suspend": True}})
    world.wait_gone("Job", "bot-a1")
    wait_for(lambda: world.condition("Suspended")["status"] == "True", what="condition Suspended")
    status = world.status()
    assert (status["phase"], status["launches"], status["attempts"][0]["cause"]) == ("Suspended", 1, "suspended")
    world.patch("FineTuneJob", "bot", {"spec": {"suspend": False}})
    world.pods_of("bot-a2")
    assert "retries" not in world.wait_phase("Starting")


def test_cancel_ends_a_running_job_for_good(world: World) -> None:
    world.share_operator()
    world.submit()
    running(world)
    world.patch("FineTuneJob", "bot", {"spec": {"cancel": True}})
    world.wait_phase("Cancelled")
    assert world.find("Job", "bot-a1") is None
    for kind, truth in {"Finished": "True", "Stalled": "True", "Complete": "False", "Failed": "False"}.items():
        assert world.condition(kind)["status"] == truth
    assert world.condition("Finished")["reason"] == "Cancelled"


def test_a_deadline_fails_the_job_and_takes_its_workers_down(world: World) -> None:
    world.share_operator()
    world.submit()
    running(world)
    world.patch("FineTuneJob", "bot", {"spec": {"runPolicy": {"activeDeadlineSeconds": 1}}})
    world.wait_phase("Failed")
    assert world.condition("Failed")["reason"] == "DeadlineExceeded"
    world.wait_gone("Job", "bot-a1")


def test_queue_suspends_and_admits_the_same_job_as_the_next_attempt(world: World) -> None:
    """Kueue's part is played by another field manager: only it ever writes spec.suspend."""
    world.share_operator()
    world.submit(labels={"kueue.x-k8s.io/queue-name": "gpus"})
    world.prepare_done()
    job = world.wait("Job", "bot-a1")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert world.wait_phase("Queued")["queue"] == "gpus"

    world.patch("Job", "bot-a1", {"spec": {"suspend": False}}, manager="kueue")
    (first,) = world.pods_of("bot-a1")
    world.leader(first, attempt=1, step=10)
    wait_for(lambda: world.status().get("attemptCount") == 1, what="attempt 1 in status")
    world.patch("Job", "bot-a1", {"spec": {"suspend": True}}, manager="kueue")
    world.wait_phase("Queued")
    evicted = "the queue took the workers away"
    wait_for(lambda: world.status()["attempts"][0].get("cause") == evicted, what="the end of attempt 1 in status")
    wait_for(lambda: not world.list("Pod", "batch.kubernetes.io/job-name=bot-a1"), what="the pods to go")

    world.patch("Job", "bot-a1", {"spec": {"suspend": False}}, manager="kueue")
    (second,) = world.pods_of("bot-a1")
    world.leader(second, attempt=2, step=10, fromStep=10)
    status = wait_for(lambda: (s := world.status()).get("attemptCount") == 2 and s, what="attempt 2 in status")
    assert [(found["number"], found["launch"]) for found in status["attempts"]] == [(1, 1), (2, 1)]
    assert "launches" not in status
    metadata = world.get("Job", "bot-a1")["metadata"]
    ours = [entry["time"] for entry in metadata["managedFields"] if entry["manager"] == "tuneward-operator"]
    assert ours == [metadata["creationTimestamp"]], "the operator wrote the Job again"


def test_a_new_job_of_the_same_name_gets_its_own_children(world: World) -> None:
    world.share_operator()
    old = world.submit()
    running(world)
    world.delete("FineTuneJob", "bot")
    new = world.submit()
    uid = new["metadata"]["uid"]
    assert uid != old["metadata"]["uid"]

    def fresh() -> bool:
        job = world.find("Job", "bot-prepare")
        return job is not None and job["metadata"]["labels"]["tuneward.dev/job-uid"] == uid

    wait_for(fresh, what="the new job's own prepare Job", timeout=60)
    assert world.wait_phase("Validating").get("launches") is None


def test_a_job_run_again_asks_for_its_server_though_the_same_model_is_there(world: World) -> None:
    """The same data gives the same bytes, and so a FineTunedModel of the same name."""
    world.share_operator()
    record = {"apiVersion": "tuneward.dev/v1alpha1", "kind": "FineTunedModel", "metadata": {"name": "bot-abababab"}}
    world.create({**record, "spec": model(1).body["spec"]})
    world.submit(serve={"server": "assistant"})
    pod = running(world)
    world.ends(pod, 0, result(pod, 1))
    world.finish_done()
    world.wait_phase("Succeeded")
    assert world.get("FineTunedModel", "bot-abababab")["metadata"]["labels"]["tuneward.dev/server"] == "assistant"
    wait_for(lambda: world.condition("Served")["reason"] == "ServerMissing", what="the model's word on its server")


def test_pods_and_jobs_of_a_finished_job_go_after_their_time_and_the_job_stays(world: World) -> None:
    world.share_operator()
    world.submit(runPolicy={"ttlSecondsAfterFinished": 0})
    pod = running(world)
    world.ends(pod, 0, result(pod, 1))
    world.finish_done()
    world.wait_phase("Succeeded")
    wait_for(lambda: not world.list("Job"), what="the Jobs to go")
    assert world.find("FineTunedModel", "bot-abababab") is not None
    assert world.status()["phase"] == "Succeeded"


def test_a_job_that_somebody_deletes_is_the_next_launch(world: World) -> None:
    world.share_operator()
    world.submit()
    running(world)
    world.delete("Job", "bot-a1")
    world.pods_of("bot-a2")
    status = world.wait_phase("Starting")
    assert status["retries"] == {"Infrastructure": 1}
    assert "deleted by somebody else" in status["attempts"][0]["cause"]


def test_a_deleted_plan_is_made_again_before_the_next_launch(world: World) -> None:
    world.share_operator()
    world.submit()
    pod = running(world)
    world.delete("ConfigMap", "bot-plan")
    world.ends(pod, 137)
    wait_for(lambda: world.find("ConfigMap", "bot-plan") or world.find("Job", "bot-prepare"), what="prepare again")
    world.prepare_done()
    world.pods_of("bot-a2")
    assert world.find("ConfigMap", "bot-plan") is not None


def test_what_the_api_server_refuses_is_said_in_status(world: World) -> None:
    world.share_operator()
    world.submit(workers={"gpusPerWorker": 0, "nodeSelector": {"not a key": "x"}})
    world.prepare_done()
    wait_for(lambda: "nodeSelector" in world.status().get("message", ""), what="the refusal in status")
    assert world.condition("Stalled")["reason"] == "ObjectRefused"


def test_a_refused_gate_registers_nothing(world: World) -> None:
    world.share_operator()
    world.submit()
    pod = running(world)
    world.ends(pod, 0, result(pod, 1))
    (finish,) = world.pods_of("bot-finish")
    message = "validation loss 2.1 is above spec.evaluation.gate.maxLoss 1.5"
    world.ends(finish, 0, {"outcome": "Failed", "reason": "GateRefused", "message": message})
    assert world.wait_phase("Failed")["message"] == message
    assert not world.list("FineTunedModel")
