"""`decide` by tables: one picture, one decision."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.operator.pictures import (
    NOW,
    SETTINGS,
    accepted,
    ago,
    finished,
    gang,
    heard,
    helper,
    job,
    owner,
    plan,
    prepared,
    result,
    seen,
    worker,
)

from tuneward_api.conditions import Phase
from tuneward_api.failures import classify
from tuneward_api.files import FinishReport
from tuneward_api.finetunedmodel import FineTunedModelSpec
from tuneward_api.finetunejob import FineTuneJobStatus
from tuneward_api.resolved import ResolvedEstimate
from tuneward_operator import build, waiting
from tuneward_operator.decide import decide
from tuneward_operator.decision import Decision, Step
from tuneward_operator.observe import Seen


def decided(picture: Seen) -> Decision:
    return decide(picture, NOW, SETTINGS)


def truth(decision: Decision, kind: str) -> tuple[str, str]:
    found = next(condition for condition in decision.status.conditions or () if condition.type == kind)
    return found.status, found.reason


def test_a_new_job_is_prepared() -> None:
    decision = decided(seen(claim_missing=True))
    assert (decision.step, decision.status.phase) == (Step.PREPARE, Phase.VALIDATING)
    assert decision.status.accepted_at == "2026-11-25T12:00:00Z"
    assert truth(decision, "Accepted") == ("Unknown", "Validating")


def test_a_named_claim_that_is_missing_is_waited_for() -> None:
    decision = decided(seen(owner(store={"claimName": "big"}), claim_missing=True))
    assert (decision.step, decision.status.phase) == (None, Phase.PENDING)
    assert truth(decision, "Stalled") == ("True", "InputMissing")
    assert decision.wake is not None


@pytest.mark.parametrize(("nodes", "phase"), [(1, Phase.VALIDATING), (3, Phase.FAILED)])
def test_several_workers_need_a_claim_for_several_nodes(nodes: int, phase: Phase) -> None:
    picture = seen(replace(owner(workers={"replicas": 2, "gpusPerWorker": 0}), gang_held="tuneward-store"), nodes=nodes)
    assert decided(picture).status.phase == phase


def test_a_job_waits_for_the_model_that_it_goes_on_from() -> None:
    of = owner(model={"uri": "model://elder"})
    problem = "FineTunedModel elder (spec.model.uri) does not exist in this namespace; `kubectl get ftm` lists those"
    waiting = decided(seen(of, input_problem=problem))
    assert (waiting.step, waiting.status.phase, waiting.status.message) == (None, Phase.PENDING, problem)
    assert truth(waiting, "Stalled") == ("True", "InputMissing")
    assert waiting.wake is not None
    assert decided(seen(of, status=waiting.status)).step == Step.PREPARE
    # What prepare needs of it was pinned before.
    running = helper("prepare", ended=False)
    assert decided(seen(of, input_problem=problem, prepare=running)).status.phase == Phase.VALIDATING
    assert decided(seen(of, input_problem=problem, prepare=prepared())).needs_plan
    failed = decided(seen(of, input_problem=problem, prepare=helper("prepare", failure=classify(exit_code=137))))
    assert failed.status.phase == Phase.RECOVERING
    gone = decided(seen(of, input_problem=problem, status=failed.status))
    assert (gone.step, gone.status.phase, gone.status.message) == (None, Phase.PENDING, problem)


def test_a_report_asks_for_the_plan_and_then_launches() -> None:
    assert decided(seen(prepare=prepared())).needs_plan
    picture = accepted(status={"phase": "Validating"})
    picture = replace(picture, status=picture.status.model_copy(update={"resolved": None}))
    decision = decided(picture)
    assert (decision.step, decision.launch, decision.status.phase) == (Step.LAUNCH, 1, Phase.STARTING)
    assert decision.status.resolved is not None
    assert truth(decision, "Accepted") == ("True", "Validated")


@pytest.mark.parametrize(("spent", "phase", "reason"), [(0, "Recovering", "Restarting"), (3, "Failed", "RetriesExhausted")])
def test_a_prepare_that_stood_still_is_tried_again_as_a_hang(spent: int, phase: str, reason: str) -> None:
    hung = classify(exit_code=75, reason="Hang", message="prepare stood still for 1800 s and was ended")
    status = FineTuneJobStatus(accepted_at="2026-11-25T11:00:00Z", retries={"Hang": spent} if spent else None)
    decision = decided(seen(status=status, prepare=helper("prepare", failure=hung)))
    assert (decision.status.phase, str(decision.reason)) == (phase, reason)
    assert str(decision.status.message).startswith(hung.sentence)


def test_a_failed_prepare_is_counted_once_then_taken_away_then_made_again() -> None:
    failed = helper("prepare", failure=classify(exit_code=137))
    first = decided(seen(prepare=failed))
    assert (first.status.phase, first.status.retries) == (Phase.RECOVERING, {"Infrastructure": 1})
    second = decided(seen(prepare=failed, status=first.status))
    assert (second.status.retries, [found.name for found in second.delete]) == ({"Infrastructure": 1}, ["bot-prepare"])
    waiting = decided(seen(status=second.status))
    assert (waiting.step, waiting.wake) == (None, 5)
    assert decide(seen(status=second.status), NOW + timedelta(seconds=6), SETTINGS).step == Step.PREPARE


def test_a_queued_job_waits_for_its_queue() -> None:
    of = owner(labels={"kueue.x-k8s.io/queue-name": "gpus"})
    decision = decided(accepted(of))
    assert (decision.step, decision.status.phase, decision.status.queue) == (Step.LAUNCH, Phase.QUEUED, "gpus")
    decision = decided(accepted(of, status={"phase": "Queued"}, gang=gang(suspended=True, started_at=None)))
    assert (decision.step, truth(decision, "Admitted")) == (None, ("False", "WaitingForQuota"))


def test_a_gang_starts_and_runs() -> None:
    of = owner(workers={"replicas": 2, "gpusPerWorker": 0})
    pending = worker(1, phase="Pending", message="0/1 nodes are available")
    decision = decided(accepted(of, status={"phase": "Starting"}, gang=gang(worker(), pending)))
    assert decision.status.message == "1 of 2 workers run; 0/1 nodes are available"
    decision = decided(accepted(of, status={"phase": "Starting"}, gang=gang(worker(), worker(1))))
    assert (decision.status.phase, truth(decision, "Running")) == (Phase.RUNNING, ("True", "Training"))


def test_where_no_node_has_a_gpu_the_way_out_is_said_at_once() -> None:
    """One is the default."""
    pending = worker(phase="Pending", message="0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    decision = decided(accepted(status={"phase": "Starting"}, gang=gang(pending)))
    assert str(decision.status.message).endswith(
        "lower spec.workers.gpusPerWorker (0 trains on CPUs), or add nodes that have as many"
    )


def test_a_silent_leader_is_stale_and_never_hangs() -> None:
    decision = decided(accepted(status={"phase": "Running"}, gang=gang(worker(started_at=ago(500)))))
    assert (decision.status.phase, truth(decision, "Running")) == (Phase.RUNNING, ("True", "ProgressStale"))


@pytest.mark.parametrize(
    ("still", "progress", "phase"),
    [
        (1800, {"step": 30}, Phase.RECOVERING),
        (1799, {"step": 30}, Phase.RUNNING),
        (9999, {"step": 0, "phase": "Loading"}, Phase.RUNNING),
        (9999, {"step": 30, "phase": "Evaluating"}, Phase.RUNNING),
    ],
)
def test_a_leader_that_answers_and_makes_no_step_hangs(still: float, progress: dict[str, Any], phase: Phase) -> None:
    leader = worker(heard=heard(still=still, **progress))
    decision = decided(accepted(status={"phase": "Running"}, gang=gang(leader)))
    assert decision.status.phase == phase
    if phase == Phase.RECOVERING:
        assert (decision.status.retries, decision.status.launches) == ({"Hang": 1}, 1)
        assert "no step for 1800 s after step 30" in str(decision.status.message)


KILLED: dict[str, Any] = {"phase": "Failed", "exit_code": 137, "reason": "Error"}


@pytest.mark.parametrize(
    ("workers", "kind"),
    [
        ([worker(**KILLED)], "Infrastructure"),
        ([worker(phase="Failed", exit_code=137, reason="OOMKilled")], "OutOfMemory"),
        ([worker(phase="Failed", exit_code=143)], "Preempted"),
        ([worker(phase="Failed", exit_code=75), worker(1, phase="Failed", exit_code=1)], "Unknown"),
        ([worker(phase="Failed", exit_code=75), worker(1, disruption="PreemptionByScheduler", **KILLED)], "Preempted"),
        ([worker(deleting=True)], "Infrastructure"),
        ([worker(deleting=True, lost=True)], "Infrastructure"),
    ],
    ids=["sigkill", "oom", "stopped", "cause-before-echo", "preempted-by-scheduler", "pod-deleted", "node-lost"],
)
def test_a_lost_worker_ends_the_attempt_and_spends_a_retry(workers: list[Any], kind: str) -> None:
    of = owner(workers={"replicas": len(workers), "gpusPerWorker": 0})
    decision = decided(accepted(of, status={"phase": "Running"}, gang=gang(*workers)))
    assert (decision.status.phase, decision.status.retries) == (Phase.RECOVERING, {kind: 1})
    assert (decision.status.launches, decision.delete) == (1, ())


@pytest.mark.parametrize(
    ("ended", "sentence"),
    [
        ({"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."}, "ephemeral-storage."),
        ({"exit_code": 128, "reason": "StartError", "message": 'exec: "python": not found in $PATH'}, '"python": not found'),
        (
            {"exit_code": 1, "message": '{"attempt": "of another version"}'},
            "a worker ended with exit code 1; its log says why",
        ),
    ],
)
def test_what_the_kubelet_says_of_a_workers_end_is_passed_on(ended: dict[str, Any], sentence: str) -> None:
    gone = worker(phase="Failed", **ended)
    decision = decided(accepted(status={"phase": "Running"}, gang=gang(gone)))
    assert sentence in str(decision.status.message)
    assert "another version" not in str(decision.status.message)


def test_a_worker_that_was_killed_for_memory_is_told_values_that_would_do() -> None:
    of = owner(workers={"gpusPerWorker": 0, "resources": {"limits": {"memory": "4Gi"}}})
    killed = worker(phase="Failed", exit_code=137, reason="OOMKilled")
    picture = accepted(of, status={"phase": "Running"}, gang=gang(killed))
    costs = ResolvedEstimate(
        memory_bytes=9 << 30, weight_bytes=0, state_bytes=0, activation_bytes=0, buffer_bytes=0, flops=1.0
    )
    assert picture.status.resolved is not None
    resolved = picture.status.resolved.model_copy(update={"estimate": costs})
    decision = decided(replace(picture, status=picture.status.model_copy(update={"resolved": resolved})))
    length = resolved.hyperparameters.sequence_length
    assert (
        "the worker was killed for memory; raise spec.workers.resources.limits.memory to 12Gi or lower "
        f"spec.hyperparameters.sequenceLength from {length} to {length // 2}"
    ) in str(decision.status.message)


def test_bad_data_found_by_the_trainer_is_not_tried_again() -> None:
    said = result(outcome="Failed", exitCode=65, reason="DataInvalid", message="sample 3 is empty")
    decision = decided(accepted(gang=gang(worker(phase="Failed", exit_code=65, result=said))))
    assert (decision.status.phase, decision.status.message) == (Phase.FAILED, "sample 3 is empty")
    assert truth(decision, "Failed") == ("True", "DataInvalid")


def test_the_next_launch_waits_for_the_last_pods_and_for_its_time() -> None:
    status = {"phase": "Recovering", "launches": 1, "message": "why", "retryAt": "2026-11-25T12:00:03Z"}
    old = job("attempt", 1)
    decision = decided(accepted(status=status, attempts=(old,), workers=(worker(deleting=True),)))
    assert (decision.step, decision.delete, decision.reason) == (None, (old,), "WaitingForOldPods")
    decision = decided(accepted(status=status))
    assert (decision.step, decision.wake, decision.status.message) == (None, 3, "why")
    gone = worker(deleting=True, lost=True)
    decision = decide(accepted(status=status, workers=(gone,)), NOW + timedelta(seconds=4), SETTINGS)
    assert (decision.step, decision.launch, decision.status.retry_at) == (Step.LAUNCH, 2, None)


def test_waits_grow_unless_the_attempt_came_further() -> None:
    spent = {"phase": "Running", "retries": {"Infrastructure": 3}}
    picture = accepted(status=spent, gang=gang(worker(**KILLED)))
    assert decided(picture).status.retry_at == "2026-11-25T12:00:40Z"
    attempt = {"number": 1, "launch": 1, "podUID": "pod-1-0", "fromStep": 0, "lastStep": 7}
    picture = accepted(status={**spent, "attempts": [attempt]}, gang=gang(worker(**KILLED)))
    assert decided(picture).status.retry_at == "2026-11-25T12:00:05Z"


def test_a_gang_that_does_not_start_is_taken_down() -> None:
    of = owner(runPolicy={"startTimeoutSeconds": 60})
    late = accepted(of, status={"phase": "Starting"}, gang=gang(worker(phase="Pending"), started_at=ago(61)))
    assert "did not start within 60 s" in (decided(late).status.message or "")
    in_time = accepted(of, status={"phase": "Starting"}, gang=gang(worker(phase="Pending"), started_at=ago(20)))
    assert decided(in_time).wake == 40


NO_ROOM = "0/3 nodes are available: 3 Insufficient cpu."


def test_a_prepare_that_does_not_start_says_why_and_is_given_up_in_the_end() -> None:
    of = owner(runPolicy={"startTimeoutSeconds": 90})
    stuck = helper("prepare", ended=False, pod_phase="Pending", waits_for=NO_ROOM)
    early = decided(seen(of, prepare=stuck))
    assert (early.status.phase, early.wake) == (Phase.VALIDATING, 30)
    assert early.status.message == f"checking the model and the data on a CPU; its pod waits: {NO_ROOM}"
    late = replace(stuck, job=job("prepare", created_at=ago(91), started_at=ago(91)))
    first = decided(seen(of, prepare=late))
    assert (first.status.phase, first.status.retries, first.delete) == (Phase.RECOVERING, {"Infrastructure": 1}, ())
    assert first.status.message == (
        f"the prepare pod did not start within 90 s ({NO_ROOM}); make room on a node, or ask for less in the operator's "
        "TUNEWARD_HELPER_CPU and TUNEWARD_HELPER_MEMORY, or raise spec.runPolicy.startTimeoutSeconds; trying again (1 of 10)"
    )
    second = decided(seen(of, prepare=late, status=first.status))
    assert [found.name for found in second.delete] == ["bot-prepare"]
    spent = FineTuneJobStatus.model_validate({"phase": "Validating", "retries": {"Infrastructure": 10}})
    last = decided(seen(of, prepare=late, status=spent))
    assert truth(last, "Failed") == ("True", "RetriesExhausted")
    running = replace(late, pod_phase="Running")
    assert (decided(seen(of, prepare=running)).status.phase, decided(seen(of, prepare=running)).wake) == (
        Phase.VALIDATING,
        None,
    )


def test_a_finish_that_does_not_start_is_given_up_too() -> None:
    stuck = helper("finish", ended=False, pod_phase="Pending", waits_for="ImagePullBackOff: no such image")
    late = replace(stuck, job=job("finish", created_at=ago(1801), started_at=ago(1801)))
    decision = decided(accepted(status={"phase": "Registering", "launches": 1}, finish=late))
    assert (decision.status.phase, decision.status.retries) == (Phase.REGISTERING, {"Infrastructure": 1})
    assert "check the image's name and its pull Secret" in str(decision.status.message)


def test_a_job_of_which_no_pod_is_made_says_where_the_reason_stands() -> None:
    early = helper("prepare", ended=False)
    early = replace(early, job=job("prepare", created_at=ago(2), started_at=ago(2)))
    decision = decided(seen(prepare=early))
    assert (decision.status.message, decision.wake) == ("checking the model and the data on a CPU", 10)
    decision = decided(seen(prepare=helper("prepare", ended=False)))
    assert str(decision.status.message).endswith("Job bot-prepare has no pod; `kubectl describe job bot-prepare` says why")
    suspended = replace(early, job=job("prepare", suspended=True, created_at=ago(9999), started_at=None))
    decision = decided(seen(prepare=suspended))
    assert (decision.status.phase, decision.wake) == (Phase.VALIDATING, None)
    assert str(decision.status.message).endswith("Job bot-prepare is suspended; something else than Tuneward did it")
    decision = decided(accepted(status={"phase": "Starting"}, gang=gang()))
    assert str(decision.status.message).startswith("0 of 1 workers run; Job bot-a1 has no pod;")


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        (NO_ROOM, "make room on a node, or ask for less in X"),
        ("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.", "lower spec.workers.gpusPerWorker (0 trains on CPUs)"),
        ("0/1 nodes are available: 1 node(s) had untolerated taint {gpu: true}.", "make the nodes fit spec.workers.node"),
        ("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.", "`kubectl describe pvc`"),
        ('persistentvolumeclaim "data" not found', "`kubectl describe pvc`"),
        ("Back-off pulling image ghcr.io/x", "check the image's name and its pull Secret"),
        ('secret "hf-token" not found', "create what it misses"),
        ("ContainerCreating", "`kubectl describe pod` says more"),
    ],
)
def test_what_to_change_where_a_pod_does_not_start(why: str, advice: str) -> None:
    assert advice in waiting.remedy(why, "X")


def test_an_attempt_whose_leader_left_a_queued_job_is_over() -> None:
    of = owner(labels={"kueue.x-k8s.io/queue-name": "gpus"})
    attempt = {"number": 1, "launch": 1, "podUID": "pod-of-before", "fromStep": 0, "lastStep": 7}
    status = {"phase": "Running", "attempts": [attempt], "attemptCount": 1}
    decision = decided(accepted(of, status=status, gang=gang(worker())))
    assert decision.status.attempts is not None
    assert decision.status.attempts[0].cause == "the queue took the workers away"
    assert decision.status.retries == {"Preempted": 1}
    assert decision.status.launches is None


def test_training_done_is_filed_then_registered() -> None:
    done = accepted(status={"phase": "Running"}, gang=gang(worker(phase="Succeeded", exit_code=0), outcome="Succeeded"))
    decision = decided(done)
    assert (decision.step, decision.status.phase, decision.status.launches) == (Step.FINISH, Phase.REGISTERING, 1)
    decision = decided(accepted(status={"phase": "Registering", "launches": 1}, finish=finished()))
    assert (decision.step, decision.status.phase) == (Step.REGISTER, Phase.SUCCEEDED)
    assert decision.status.model is not None
    assert decision.status.model.name == "bot-abababab"
    assert truth(decision, "Complete") == ("True", "Succeeded")


def test_a_model_that_was_trained_whole_says_what_serves_it() -> None:
    report = finished().report
    assert isinstance(report, FinishReport)
    assert report.adapter is not None
    folder = f"tuned/sha256-{'ab' * 32}"
    whole = {"type": "Full", "sub_path": folder, "rank": None, "alpha": None, "target_modules": None}
    made = report.model_copy(update={"adapter": report.adapter.model_copy(update=whole)})
    decision = decided(accepted(status={"phase": "Registering", "launches": 1}, finish=helper("finish", made)))
    assert decision.step == Step.REGISTER
    assert str(decision.status.message).endswith(f"spec.model.uri is pvc://tuneward-store/{folder}/model")
    assert decision.adapter is not None
    body = build.finetuned_model(owner(), plan(owner()), decision.adapter)
    assert "adapter" not in body["spec"]
    FineTunedModelSpec.model_validate(body["spec"])


def test_the_gate_refuses() -> None:
    report = FinishReport.model_validate({"outcome": "Failed", "reason": "GateRefused", "message": "2.1 is above 1.5"})
    decision = decided(accepted(status={"phase": "Registering"}, finish=helper("finish", report)))
    assert (decision.step, decision.status.phase, decision.status.message) == (None, Phase.FAILED, "2.1 is above 1.5")


def test_without_its_plan_a_job_is_prepared_again() -> None:
    picture = replace(accepted(status={"phase": "Recovering", "launches": 1}), plan=None)
    decision = decided(picture)
    assert (decision.status.resolved, [found.name for found in decision.delete]) == (None, ["bot-prepare"])
    assert decision.status.launches == 1


@pytest.mark.parametrize(("spec", "phase"), [({"suspend": True}, Phase.SUSPENDED), ({"cancel": True}, Phase.CANCELLING)])
def test_a_stop_is_counted_before_the_job_is_deleted(spec: dict[str, Any], phase: Phase) -> None:
    picture = accepted(owner(**spec), status={"phase": "Running"}, gang=gang(worker()))
    first = decided(picture)
    assert (first.status.phase, first.status.launches, first.delete, first.wake) == (phase, 1, (), 0)
    running = gang(worker())
    second = decided(replace(picture, status=first.status, gang=None, attempts=(running.job,)))
    assert second.delete == (running.job,)
    assert truth(second, "Suspended")[0] == "False"
    last = decided(replace(picture, status=second.status, gang=None, attempts=(), workers=()))
    assert last.status.phase == (Phase.SUSPENDED if "suspend" in spec else Phase.CANCELLED)
    assert truth(last, "Suspended")[0] == str("suspend" in spec)


def test_suspending_what_is_trained_already_files_it_all_the_same() -> None:
    done = gang(worker(phase="Succeeded", exit_code=0), outcome="Succeeded")
    assert decided(accepted(owner(suspend=True), status={"phase": "Running"}, gang=done)).step == Step.FINISH


def test_a_deadline_wakes_and_strikes() -> None:
    of = owner(runPolicy={"activeDeadlineSeconds": 3610})
    assert decided(accepted(of, status={"phase": "Running"}, gang=gang(worker()))).wake == 10
    of = owner(runPolicy={"activeDeadlineSeconds": 60})
    decision = decided(accepted(of, status={"phase": "Running"}, gang=gang(worker())))
    assert truth(decision, "Failed") == ("True", "DeadlineExceeded")
    assert str(decision.status.message).endswith("raise spec.runPolicy.activeDeadlineSeconds in a new job")


def test_a_deadline_loses_nothing_that_is_trained() -> None:
    of = owner(runPolicy={"activeDeadlineSeconds": 60})
    done = gang(worker(phase="Succeeded", exit_code=0), outcome="Succeeded")
    assert decided(accepted(of, status={"phase": "Running"}, gang=done)).step == Step.FINISH
    filing = decided(accepted(of, status={"phase": "Registering", "launches": 1}, finish=helper("finish", ended=False)))
    assert (filing.status.phase, filing.wake) == (Phase.REGISTERING, 10)
    assert decided(accepted(of, status={"phase": "Registering", "launches": 1}, finish=finished())).step == Step.REGISTER


def test_after_the_end_nothing_is_made_and_what_runs_goes() -> None:
    ended = {"phase": "Succeeded", "finishedAt": "2026-11-25T11:59:00Z", "launches": 1}
    over = job("attempt", 1, conditions={"Complete": ""})
    decision = decided(accepted(status=ended, attempts=(over,)))
    assert (decision.step, decision.delete, decision.wake) == (None, (), 86340)
    left = job("attempt", 1)
    assert decided(accepted(status={**ended, "phase": "Failed"}, attempts=(left,))).delete == (left,)
    failed = worker(phase="Failed", exit_code=1)
    assert decided(accepted(status={**ended, "phase": "Failed"}, attempts=(left,), workers=(failed,))).delete == ()


def test_a_change_of_serve_after_the_end_moves_the_model_once() -> None:
    of = owner(serve={"server": "new"})
    status = {"phase": "Succeeded", "finishedAt": "2026-11-25T11:59:00Z"}
    assert decided(accepted(of, status=status, model_server="old")).relabel == "new"
    assert decided(accepted(of, status={**status, "observedGeneration": 1}, model_server="old")).relabel is None
    assert decided(accepted(of, status=status)).relabel is None


def test_an_operator_that_cannot_read_a_running_job_leaves_it_alone() -> None:
    picture = replace(accepted(status={"phase": "Running"}, gang=gang(worker())), refusal="spec.future: unknown")
    assert decided(picture).status == picture.status
    new = replace(seen(), refusal="spec.future: unknown")
    assert truth(decided(new), "Failed") == ("True", "ConfigInvalid")


def test_a_second_pass_over_the_same_picture_writes_nothing() -> None:
    picture = accepted(status={"phase": "Running"}, gang=gang(worker(heard=heard(step=5))))
    first = decided(picture).status
    again = decide(replace(picture, status=first), NOW + timedelta(seconds=20), SETTINGS).status
    assert again.to_json() == first.to_json()
    assert FineTuneJobStatus.model_validate(first.to_json()) == first
