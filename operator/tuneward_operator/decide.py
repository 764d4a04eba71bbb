"""What should happen next with a FineTuneJob. Pure: the same picture and the same time give the same decision.

Every pass decides from scratch, so that any pass from any state leads on, and missed or doubled events change nothing.
A pass makes or deletes a few objects and then writes status once. Where a crash may fall between the two, the next pass
finds the object by its name and goes on; what must be counted once (launches, retries) is counted in the same write that
moves the job to where it is not counted again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, auto

from tuneward_api.conditions import FINAL_PHASES, FailureClass, Phase, Reason
from tuneward_api.failures import DEFAULT_RETRIES, Failure, with_values
from tuneward_api.files import FinishedAdapter, FinishReport, PrepareReport
from tuneward_api.finetunejob import FineTuneJobSpec, FineTuneJobStatus, ModelStatus, RunPolicy
from tuneward_api.names import DEFAULT_STORE_CLAIM
from tuneward_operator import build, waiting
from tuneward_operator import gang as gangs
from tuneward_operator import status as texts
from tuneward_operator.observe import Gang, Helper, Seen
from tuneward_operator.settings import Settings
from tuneward_operator.status import Say, stamp
from tuneward_operator.views import JobView, instant

DEFAULT_TTL_SECONDS = 86_400
LONGEST_RETRY_SECONDS = 300.0
LOOK_AGAIN_SECONDS = 10.0
"""For what no event tells of: a claim that somebody makes, a node that comes back or goes."""


class Step(Enum):
    """What a pass may make. Each is idempotent: what is there already is taken."""

    PREPARE = auto()
    LAUNCH = auto()
    FINISH = auto()
    REGISTER = auto()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`wake`: seconds until the clock alone may change something. `needs_plan`: decide again with the plan at hand."""

    status: FineTuneJobStatus
    reason: Reason
    step: Step | None = None
    launch: int = 0
    adapter: FinishedAdapter | None = None
    delete: tuple[JobView, ...] = ()
    wake: float | None = None
    needs_plan: bool = False
    relabel: str | None = None
    """The server that the model's label shall name; empty: none. None: it stays."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One decision in the making."""

    seen: Seen
    status: FineTuneJobStatus
    now: datetime
    settings: Settings

    @property
    def policy(self) -> RunPolicy:
        return self.seen.owner.spec.run_policy or RunPolicy()

    def with_status(self, **update: object) -> Context:
        return replace(self, status=self.status.model_copy(update=update))

    def say(
        self,
        say: Say,
        *,
        step: Step | None = None,
        launch: int = 0,
        adapter: FinishedAdapter | None = None,
        delete: tuple[JobView, ...] = (),
        wake: float | None = None,
    ) -> Decision:
        return Decision(
            status=texts.conclude(self.seen, self.status, say, self.now),
            reason=say.reason,
            step=step,
            launch=launch,
            adapter=adapter,
            delete=delete,
            wake=wake,
        )


def decide(seen: Seen, now: datetime, settings: Settings) -> Decision:
    status = texts.absorb(seen, now, progress_every=settings.progress_seconds)
    context = Context(seen=seen, status=status, now=now, settings=settings)
    if seen.status.phase in FINAL_PHASES:
        return _after_the_end(replace(context, status=seen.status))
    if seen.refusal:
        if seen.status.accepted_at is not None:
            # Accepted by a newer version, which may come back: a roll-back of the operator harms no running job.
            return Decision(status=seen.status, reason=Reason.PENDING)
        return _end(context, Phase.FAILED, Reason.CONFIG_INVALID, seen.refusal)
    if seen.owner.spec.cancel:
        return _cancel(context)
    # What is trained is filed, however late: nothing is saved by losing it.
    deadline = None if gangs.trained(seen) else _deadline(context)
    if deadline is not None and now >= deadline:
        seconds = context.policy.active_deadline_seconds
        message = f"not finished {seconds} s after it was accepted; raise spec.runPolicy.activeDeadlineSeconds in a new job"
        return _end(context, Phase.FAILED, Reason.DEADLINE_EXCEEDED, message)
    decision = _go_on(context)
    if deadline is not None:
        left = (deadline - now).total_seconds()
        decision = replace(decision, wake=left if decision.wake is None else min(left, decision.wake))
    return decision


def _go_on(context: Context) -> Decision:
    seen = context.seen
    if seen.owner.spec.suspend and not gangs.trained(seen):
        return _suspend(context)
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
        return _end(context, Phase.FAILED, Reason.CONFIG_INVALID, message)
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
        return _retry(context, helper.failure, to=Phase.RECOVERING)
    if not context.seen.plan_sought:
        return _needs_plan(context)
    if context.seen.plan is None:
        # The request is gone, so the report is of nobody knows what.
        message = "the request that the data was checked for was deleted; checking again"
        say = Say(phase=Phase.VALIDATING, reason=Reason.VALIDATING, message=message, at_rest=False)
        return context.say(say, delete=_living([helper.job]), wake=0)
    context = context.with_status(resolved=texts.resolved_of(context.seen.plan))
    return _train(context)


def _run_helper(context: Context, helper: Helper | None, step: Step, say: Say) -> Decision:
    """Starts it, waits for it, or, where its failure has been counted, takes it away first."""
    if helper is not None and (helper.ended or helper.job.deleting_since is not None):
        return context.say(_restarting(context, say), delete=_living([helper.job]), wake=LOOK_AGAIN_SECONDS)
    if helper is not None:
        return context.with_status(retry_at=None).say(say, wake=waiting.next_look(helper, context.now, context.policy))
    left = _until_retry(context)
    if left > 0:
        return context.say(_restarting(context, say), wake=left)
    return context.with_status(retry_at=None).say(say, step=step)


def _restarting(context: Context, say: Say) -> Say:
    """The sentence that says what failed stays until the next try has begun."""
    if not context.status.retry_at:
        return say
    phase = Phase.REGISTERING if say.phase == Phase.REGISTERING else Phase.RECOVERING
    return Say(phase=phase, reason=Reason.RESTARTING, message=context.seen.status.message or say.message, at_rest=False)


def _helper_message(context: Context, doing: str, helper: Helper | None) -> str:
    why = waiting.why(helper, context.now) if helper is not None else ""
    return f"{doing}; {why}" if why else doing


# Training


def _train(context: Context) -> Decision:
    gang = context.seen.gang
    if gang is None:
        return _launch(context)
    if gang.outcome == "Succeeded":
        return _register(_ended(context, gang.launch, texts.SUCCEEDED))
    failure = gangs.failure(gang, context.now, context.policy, context.seen.owner.replicas)
    if failure is not None:
        failure = with_values(failure, context.status.resolved, limit=_memory_limit(context.seen.owner.spec))
        return _retry(_ended(context, gang.launch, failure.sentence), failure, to=Phase.RECOVERING)
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
        return _retry(_ended(context, launches + 1, gangs.DELETED.sentence), gangs.DELETED, to=Phase.RECOVERING)
    stale = tuple(job for job in seen.attempts if job.launch <= (seen.status.launches or 0))
    left = [worker for worker in seen.workers if worker.left]
    wait = _until_retry(context)
    if stale or left or wait > 0:
        old = "waiting for the pods of the last attempt to end"
        message = (seen.status.message if seen.status.phase == Phase.RECOVERING else None) or old
        reason = Reason.WAITING_FOR_OLD_PODS if left else Reason.RESTARTING
        say = Say(phase=Phase.RECOVERING, reason=reason, message=message, at_rest=False)
        return context.say(say, delete=_living(stale), wake=LOOK_AGAIN_SECONDS if stale or left else wait)
    if not seen.plan_sought:
        return _needs_plan(context)
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


def _ended(context: Context, launch: int, cause: str) -> Context:
    """The write that records a launch's end; its Job is deleted only after it."""
    return replace(context, status=texts.close(context.status, cause)).with_status(launches=launch)


def _note_eviction(context: Context, gang: Gang) -> Context:
    """An open attempt whose leader has gone while its Job lives on was ended by the queue: same Job, next attempt."""
    alive = frozenset(worker.uid for worker in gang.workers if not worker.deleting)
    ended = texts.open_attempts(context.status, alive=alive)
    if not ended:
        return context
    retries = dict(context.status.retries or {})
    retries[FailureClass.PREEMPTED] = retries.get(FailureClass.PREEMPTED, 0) + len(ended)
    closed = texts.close(context.status, "the queue took the workers away", alive=alive)
    return replace(context, status=closed).with_status(retries=retries)


def _retry(context: Context, failure: Failure, *, to: Phase) -> Decision:
    """Spends one retry of the failure's class, or ends the job where there is none left."""
    kind = failure.failure_class
    spent = (context.status.retries or {}).get(kind, 0)
    budget = _budget(context.policy, kind)
    if spent >= budget:
        if budget == 0 or spent == 0:
            return _end(context, Phase.FAILED, failure.reason, failure.sentence)
        often = "once" if spent == 1 else f"{spent} times"
        message = f"{failure.sentence} (tried again {often}, spec.runPolicy.retries allows no more for {kind})"
        return _end(context, Phase.FAILED, Reason.RETRIES_EXHAUSTED, message)
    first = context.settings.retry_seconds
    wait = first if texts.progressed(context.status) else min(LONGEST_RETRY_SECONDS, first * 2.0 ** min(spent, 20))
    context = context.with_status(
        retries={**(context.status.retries or {}), kind: spent + 1},
        retry_at=stamp(context.now + timedelta(seconds=wait)),
    )
    message = f"{failure.sentence}; trying again ({spent + 1} of {budget})"
    return context.say(Say(phase=to, reason=Reason.RESTARTING, message=message, at_rest=False), wake=0)


def _budget(policy: RunPolicy, kind: FailureClass) -> int:
    asked = policy.retries
    chosen = (
        {
            FailureClass.INFRASTRUCTURE: asked.infrastructure,
            FailureClass.PREEMPTED: asked.preempted,
            FailureClass.OUT_OF_MEMORY: asked.out_of_memory,
            FailureClass.NUMERICAL_DIVERGENCE: asked.numerical_divergence,
            FailureClass.HANG: asked.hang,
            FailureClass.USER_CODE: asked.user_code,
            FailureClass.UNKNOWN: asked.unknown,
        }
        if asked is not None
        else {}
    )
    found = chosen.get(kind)
    return DEFAULT_RETRIES[kind] if found is None else found


def _memory_limit(spec: FineTuneJobSpec) -> int | str | None:
    """Of a worker, as the job names it."""
    resources = spec.workers.resources if spec.workers is not None else None
    return (resources.limits or {}).get("memory") if resources is not None else None


def _until_retry(context: Context) -> float:
    due = instant(context.status.retry_at)
    return 0.0 if due is None else (due - context.now).total_seconds()


# After training


def _register(context: Context) -> Decision:
    helper = waiting.judged(context.seen.finish, build.FINISH, context.now, context.policy)
    if helper is not None and helper.ended and not context.status.retry_at:
        return _finished(context, helper)
    message = _helper_message(context, "checking and filing the trained adapter", helper)
    registering = Say(phase=Phase.REGISTERING, reason=Reason.REGISTERING, message=message)
    if helper is None and _until_retry(context) <= 0:
        if not context.seen.plan_sought:
            return _needs_plan(context)
        if context.seen.plan is None:
            return _without_plan(context)
    return _run_helper(context, helper, Step.FINISH, registering)


def _finished(context: Context, helper: Helper) -> Decision:
    report = helper.report
    if isinstance(report, FinishReport) and report.reason == Reason.GATE_REFUSED:
        return _end(context, Phase.FAILED, Reason.GATE_REFUSED, report.message)
    if not isinstance(report, FinishReport) or report.outcome != "Done" or report.adapter is None:
        return _retry(context, helper.failure, to=Phase.REGISTERING)
    if not context.seen.plan_sought:
        return _needs_plan(context)
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
    done = _end(context.with_status(model=model), Phase.SUCCEEDED, Reason.SUCCEEDED, message)
    return replace(done, step=Step.REGISTER, adapter=adapter)


def _without_plan(context: Context) -> Decision:
    """Somebody deleted it; prepare makes the same one, and the trainer reports its result again."""
    message = "the plan was deleted; checking the model and the data again"
    say = Say(phase=Phase.VALIDATING, reason=Reason.VALIDATING, message=message, at_rest=False)
    helpers = [helper.job for helper in (context.seen.prepare, context.seen.finish) if helper is not None]
    return context.with_status(resolved=None).say(say, delete=_living(helpers), wake=0)


def _needs_plan(context: Context) -> Decision:
    return Decision(status=context.status, reason=Reason.PENDING, needs_plan=True)


# Stops and ends


def _suspend(context: Context) -> Decision:
    context, living = _stop(context, "suspended")
    if living or _pods_left(context.seen):
        message = "saving a checkpoint and freeing the workers"
        say = Say(phase=Phase.SUSPENDED, reason=Reason.SUSPENDED, message=message, at_rest=False)
        return context.say(say, delete=_recorded(context, living), wake=_soon(context, living))
    message = "suspended; set spec.suspend to false to go on"
    return context.say(Say(phase=Phase.SUSPENDED, reason=Reason.SUSPENDED, message=message))


def _cancel(context: Context) -> Decision:
    context, living = _stop(context, "cancelled")
    if living or _pods_left(context.seen):
        message = "ending the workers"
        say = Say(phase=Phase.CANCELLING, reason=Reason.CANCELLING, message=message, at_rest=False)
        return context.say(say, delete=_recorded(context, living), wake=_soon(context, living))
    return _end(
        context, Phase.CANCELLED, Reason.CANCELLED, "cancelled by spec.cancel; checkpoints stay in the run directory"
    )


def _stop(context: Context, cause: str) -> tuple[Context, tuple[JobView, ...]]:
    """Records the end of what runs. Also gives the Jobs that are still there to be deleted."""
    seen = context.seen
    if seen.gang is not None:
        context = _ended(context, seen.gang.launch, cause)
    context = replace(context, status=texts.close(context.status, cause)).with_status(retry_at=None)
    helpers = [helper for helper in (seen.prepare, seen.finish) if helper is not None]
    # One whose failure was counted goes too: nothing shall count it again when the job goes on.
    doomed = [helper.job for helper in helpers if not helper.ended or seen.status.retry_at]
    return context, (*seen.attempts, *doomed)


def _recorded(context: Context, jobs: tuple[JobView, ...]) -> tuple[JobView, ...]:
    """A launch's Job goes only after the write that counted it."""
    counted = context.seen.status.launches or 0
    return _living([job for job in jobs if job.launch <= counted])


def _soon(context: Context, jobs: tuple[JobView, ...]) -> float:
    uncounted = any(job.launch > (context.seen.status.launches or 0) for job in jobs)
    return 0.0 if uncounted else LOOK_AGAIN_SECONDS


def _pods_left(seen: Seen) -> bool:
    return seen.helpers_left or any(worker.left for worker in seen.workers)


def _end(context: Context, phase: Phase, reason: Reason, message: str) -> Decision:
    gang = context.seen.gang
    if gang is not None and gang.launch > (context.status.launches or 0):
        context = _ended(context, gang.launch, message)
    context = context.with_status(finished_at=stamp(context.now), retry_at=None)
    return context.say(Say(phase=phase, reason=reason, message=message), wake=0)


def _after_the_end(context: Context) -> Decision:
    """Nothing is made any more, whatever is missing. What still runs goes at once, the rest after its time."""
    seen = context.seen
    helpers = [helper for helper in (seen.prepare, seen.finish) if helper is not None]
    jobs = (*seen.attempts, *(helper.job for helper in helpers))
    left = _ttl_left(context)
    running = [job for job in seen.attempts if not gangs.over(job, seen.workers)]
    running += [helper.job for helper in helpers if not helper.ended]
    doomed = running if left > 0 else list(jobs)
    return Decision(
        status=texts.mirrored(seen, context.now),
        reason=Reason.SUCCEEDED,
        delete=_living(doomed),
        wake=left if jobs and left > 0 else None,
        relabel=_relabel(seen),
    )


def _relabel(seen: Seen) -> str | None:
    """Follows a change of spec.serve, once: afterwards the label is whoever's who moves the model elsewhere."""
    wanted = seen.owner.spec.serve.server if seen.owner.spec.serve is not None else ""
    changed = seen.status.observed_generation != seen.generation
    return wanted if changed and seen.model_server not in (None, wanted) else None


def _ttl_left(context: Context) -> float:
    ttl = context.policy.ttl_seconds_after_finished
    ended = instant(context.status.finished_at) or context.now
    return (ended - context.now).total_seconds() + (DEFAULT_TTL_SECONDS if ttl is None else ttl)


def _deadline(context: Context) -> datetime | None:
    seconds, began = context.policy.active_deadline_seconds, instant(context.status.accepted_at)
    return began + timedelta(seconds=seconds) if seconds is not None and began is not None else None


def _living(jobs: list[JobView] | tuple[JobView, ...]) -> tuple[JobView, ...]:
    return tuple(job for job in jobs if job.deleting_since is None)
