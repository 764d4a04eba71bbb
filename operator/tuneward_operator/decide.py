"""What should happen next with a FineTuneJob. Pure: the same picture and the same time give the same decision.

Every pass decides from scratch, so that any pass from any state leads on, and missed or doubled events change nothing.
A pass makes or deletes a few objects and then writes status once. Where a crash may fall between the two, the next pass
finds the object by its name and goes on; what must be counted once (launches, retries) is counted in the same write that
moves the job to where it is not counted again.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from tuneward_api.conditions import FINAL_PHASES, FailureClass, Phase, Reason
from tuneward_api.failures import with_values
from tuneward_api.files import FinishReport, PrepareReport
from tuneward_api.finetunejob import FineTuneJobSpec, ModelStatus
from tuneward_api.names import DEFAULT_STORE_CLAIM
from tuneward_operator import build, waiting
from tuneward_operator import gang as gangs
from tuneward_operator import status as texts
from tuneward_operator.decision import LOOK_AGAIN_SECONDS, Context, Decision, Step, end, ended, living, needs_plan
from tuneward_operator.observe import Gang, Helper, Seen
from tuneward_operator.retries import restarting, retry, until_retry
from tuneward_operator.settings import Settings
from tuneward_operator.status import Say, stamp
from tuneward_operator.stops import after_the_end, cancel, suspend
from tuneward_operator.views import instant


def decide(seen: Seen, now: datetime, settings: Settings) -> Decision:
    status = texts.absorb(seen, now, progress_every=settings.progress_seconds)
    context = Context(seen=seen, status=status, now=now, settings=settings)
    if seen.status.phase in FINAL_PHASES:
        return after_the_end(replace(context, status=seen.status))
    if seen.refusal:
        if seen.status.accepted_at is not None:
            # Accepted by a newer version, which may come back: a roll-back of the operator harms no running job.
            return Decision(status=seen.status, reason=Reason.PENDING)
        return end(context, Phase.FAILED, Reason.CONFIG_INVALID, seen.refusal)
    if seen.owner.spec.cancel:
        return cancel(context)
    # What is trained is filed, however late: nothing is saved by losing it.
    deadline = None if gangs.trained(seen) else _deadline(context)
    if deadline is not None and now >= deadline:
        seconds = context.policy.active_deadline_seconds
        message = f"not finished {seconds} s after it was accepted; raise spec.runPolicy.activeDeadlineSeconds in a new job"
        return end(context, Phase.FAILED, Reason.DEADLINE_EXCEEDED, message)
    decision = _go_on(context)
    if deadline is not None:
        left = (deadline - now).total_seconds()
        decision = replace(decision, wake=left if decision.wake is None else min(left, decision.wake))
    return decision


def _go_on(context: Context) -> Decision:
    seen = context.seen
    if seen.owner.spec.suspend and not gangs.trained(seen):
        return suspend(context)
    if context.status.resolved is None:
        return _prepare(context)
    if seen.status.phase == Phase.REGISTERING:
        return _register(context)
    return _train(context)


# Before training


def _prepare(context: Context) -> Decision:
    seen = context.seen
    context = context.with_status(accepted_at=context.status.accepted_at or stamp(context.now))
    claim = seen.owner.store_claim
    if seen.claim_missing and claim != DEFAULT_STORE_CLAIM:
        message = f"PersistentVolumeClaim {claim} (spec.store.claimName) does not exist in this namespace; create it"
        say = Say(phase=Phase.PENDING, reason=Reason.INPUT_MISSING, message=message, at_rest=False, stalled=True)
        return context.say(say, wake=LOOK_AGAIN_SECONDS)
    if seen.owner.gang_held and seen.owner.replicas > 1 and (seen.nodes or 1) > 1:
        message = (
            f"PersistentVolumeClaim {seen.owner.gang_held} can be mounted on one node only (ReadWriteOnce) and "
            f"spec.workers.replicas is {seen.owner.replicas}; use a ReadWriteMany claim or one worker"
        )
        return end(context, Phase.FAILED, Reason.CONFIG_INVALID, message)
    helper = waiting.judged(seen.prepare, build.PREPARE, context.now, context.policy)
    if helper is None and seen.input_problem:
        # Once prepare runs, it says itself what it cannot read; all that it needs of a parent is in the request.
        say = Say(phase=Phase.PENDING, reason=Reason.INPUT_MISSING, message=seen.input_problem, at_rest=False, stalled=True)
        return context.say(say, wake=LOOK_AGAIN_SECONDS)
    if helper is not None and helper.ended and not context.status.retry_at:
        return _prepared(context, helper)
    validating = Say(
        phase=Phase.VALIDATING,
        reason=Reason.VALIDATING,
        message=_helper_message(context, "checking the model and the data on a CPU", helper),
    )
    return _run_helper(context, helper, Step.PREPARE, validating)


def _prepared(context: Context, helper: Helper) -> Decision:
    report = helper.report
    if not isinstance(report, PrepareReport) or report.outcome != "Done" or report.prepared is None:
        return retry(context, helper.failure, to=Phase.RECOVERING)
    if not context.seen.plan_sought:
        return needs_plan(context)
    if context.seen.plan is None:
        # The request is gone, so the report is of nobody knows what.
        message = "the request that the data was checked for was deleted; checking again"
        say = Say(phase=Phase.VALIDATING, reason=Reason.VALIDATING, message=message, at_rest=False)
        return context.say(say, delete=living([helper.job]), wake=0)
    context = context.with_status(resolved=texts.resolved_of(context.seen.plan))
    return _train(context)


def _run_helper(context: Context, helper: Helper | None, step: Step, say: Say) -> Decision:
    """Starts it, waits for it, or, where its failure has been counted, takes it away first."""
    if helper is not None and (helper.ended or helper.job.deleting_since is not None):
        return context.say(restarting(context, say), delete=living([helper.job]), wake=LOOK_AGAIN_SECONDS)
    if helper is not None:
        return context.with_status(retry_at=None).say(say, wake=waiting.next_look(helper, context.now, context.policy))
    left = until_retry(context)
    if left > 0:
        return context.say(restarting(context, say), wake=left)
    return context.with_status(retry_at=None).say(say, step=step)


def _helper_message(context: Context, doing: str, helper: Helper | None) -> str:
    why = waiting.why(helper, context.now) if helper is not None else ""
    return f"{doing}; {why}" if why else doing


# Training


def _train(context: Context) -> Decision:
    gang = context.seen.gang
    if gang is None:
        return _launch(context)
    if gang.outcome == "Succeeded":
        return _register(ended(context, gang.launch, texts.SUCCEEDED))
    failure = gangs.failure(gang, context.now, context.policy, context.seen.owner.replicas)
    if failure is not None:
        failure = with_values(failure, context.status.resolved, limit=_memory_limit(context.seen.owner.spec))
        return retry(ended(context, gang.launch, failure.sentence), failure, to=Phase.RECOVERING)
    context = context.with_status(retry_at=None)
    if gang.suspended or context.seen.owner.queue:
        context = _note_eviction(context, gang)
    if gang.suspended:
        queue = context.seen.owner.queue
        message = (
            f"waiting for quota in queue {queue}" if queue else "its Job is suspended; something else than Tuneward did it"
        )
        message += f": {gang.queue_says}" if gang.queue_says else ""
        return context.say(Say(phase=Phase.QUEUED, reason=Reason.WAITING_FOR_QUOTA, message=message))
    return _with_gang(context, gang)


def _with_gang(context: Context, gang: Gang) -> Decision:
    replicas = context.seen.owner.replicas
    if not gangs.running(gang, replicas):
        say = Say(
            phase=Phase.STARTING, reason=Reason.WAITING_FOR_PODS, message=gangs.start_message(gang, replicas, context.now)
        )
        return context.say(say, wake=gangs.next_look(gang, context.now, context.policy))
    stale = gangs.stale(gang.leader, context.now, context.settings.stale_seconds)
    workers = "1 worker" if replicas == 1 else f"{replicas} workers"
    message = f"training on {workers}"
    if stale:
        message += (
            "; its leader does not answer, so progress is unknown "
            "(a network policy may block port 8787, or the operator runs outside the pods' network)"
        )
    say = Say(phase=Phase.RUNNING, reason=Reason.TRAINING, message=message, stale=stale)
    return context.say(say, wake=context.settings.progress_seconds)


def _launch(context: Context) -> Decision:
    seen, launches = context.seen, context.status.launches or 0
    if seen.status.phase in (Phase.QUEUED, Phase.STARTING, Phase.RUNNING):
        return retry(ended(context, launches + 1, gangs.DELETED.sentence), gangs.DELETED, to=Phase.RECOVERING)
    stale = tuple(job for job in seen.attempts if job.launch <= (seen.status.launches or 0))
    left = [worker for worker in seen.workers if worker.left]
    wait = until_retry(context)
    if stale or left or wait > 0:
        old = "waiting for the pods of the last attempt to end"
        message = (seen.status.message if seen.status.phase == Phase.RECOVERING else None) or old
        reason = Reason.WAITING_FOR_OLD_PODS if left else Reason.RESTARTING
        say = Say(phase=Phase.RECOVERING, reason=reason, message=message, at_rest=False)
        return context.say(say, delete=living(stale), wake=LOOK_AGAIN_SECONDS if stale or left else wait)
    if not seen.plan_sought:
        return needs_plan(context)
    if seen.plan is None:
        return _without_plan(context)
    context = context.with_status(retry_at=None)
    if seen.owner.queue:
        say = Say(
            phase=Phase.QUEUED, reason=Reason.WAITING_FOR_QUOTA, message=f"waiting for quota in queue {seen.owner.queue}"
        )
    else:
        resumed = seen.status.phase == Phase.SUSPENDED
        reason = Reason.RESUMED if resumed else Reason.WAITING_FOR_PODS
        say = Say(phase=Phase.STARTING, reason=reason, message="starting the workers")
    return context.say(say, step=Step.LAUNCH, launch=launches + 1)


def _note_eviction(context: Context, gang: Gang) -> Context:
    """An open attempt whose leader has gone while its Job lives on was ended by the queue: same Job, next attempt."""
    alive = frozenset(worker.uid for worker in gang.workers if not worker.deleting)
    gone = texts.open_attempts(context.status, alive=alive)
    if not gone:
        return context
    retries = dict(context.status.retries or {})
    retries[FailureClass.PREEMPTED] = retries.get(FailureClass.PREEMPTED, 0) + len(gone)
    closed = texts.close(context.status, "the queue took the workers away", alive=alive)
    return replace(context, status=closed).with_status(retries=retries)


def _memory_limit(spec: FineTuneJobSpec) -> int | str | None:
    """Of a worker, as the job names it."""
    resources = spec.workers.resources if spec.workers is not None else None
    return (resources.limits or {}).get("memory") if resources is not None else None


# After training


def _register(context: Context) -> Decision:
    helper = waiting.judged(context.seen.finish, build.FINISH, context.now, context.policy)
    if helper is not None and helper.ended and not context.status.retry_at:
        return _finished(context, helper)
    message = _helper_message(context, "checking and filing the trained adapter", helper)
    registering = Say(phase=Phase.REGISTERING, reason=Reason.REGISTERING, message=message)
    if helper is None and until_retry(context) <= 0:
        if not context.seen.plan_sought:
            return needs_plan(context)
        if context.seen.plan is None:
            return _without_plan(context)
    return _run_helper(context, helper, Step.FINISH, registering)


def _finished(context: Context, helper: Helper) -> Decision:
    report = helper.report
    if isinstance(report, FinishReport) and report.reason == Reason.GATE_REFUSED:
        return end(context, Phase.FAILED, Reason.GATE_REFUSED, report.message)
    if not isinstance(report, FinishReport) or report.outcome != "Done" or report.adapter is None:
        return retry(context, helper.failure, to=Phase.REGISTERING)
    if not context.seen.plan_sought:
        return needs_plan(context)
    if context.seen.plan is None:
        return _without_plan(context)
    adapter = report.adapter
    model = ModelStatus(
        name=build.model_name(context.seen.owner, adapter.digest),
        served_name=adapter.served_name,
        digest=adapter.digest,
        validation_loss_before=adapter.metrics.validation_loss_before,
        validation_loss_after=adapter.metrics.validation_loss_after,
    )
    message = f"FineTunedModel {model.name} is ready to be served as {model.served_name}"
    if adapter.whole:
        uri = f"pvc://{context.seen.plan.request.store_claim}/{adapter.folder}"
        message = f"FineTunedModel {model.name} is a base model of its own: make a ModelServer whose spec.model.uri is {uri}"
    done = end(context.with_status(model=model), Phase.SUCCEEDED, Reason.SUCCEEDED, message)
    return replace(done, step=Step.REGISTER, adapter=adapter)


def _without_plan(context: Context) -> Decision:
    """Somebody deleted it; prepare makes the same one, and the trainer reports its result again."""
    message = "the plan was deleted; checking the model and the data again"
    say = Say(phase=Phase.VALIDATING, reason=Reason.VALIDATING, message=message, at_rest=False)
    helpers = [helper.job for helper in (context.seen.prepare, context.seen.finish) if helper is not None]
    return context.with_status(resolved=None).say(say, delete=living(helpers), wake=0)


def _deadline(context: Context) -> datetime | None:
    seconds, began = context.policy.active_deadline_seconds, instant(context.status.accepted_at)
    return began + timedelta(seconds=seconds) if seconds is not None and began is not None else None
