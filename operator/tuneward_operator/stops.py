"""What a person or an end stops: suspended, cancelled, and what is kept of a job that is over. Pure."""

from __future__ import annotations

from dataclasses import replace

from tuneward_api.conditions import Phase, Reason
from tuneward_operator import gang as gangs
from tuneward_operator import status as texts
from tuneward_operator.decision import LOOK_AGAIN_SECONDS, Context, Decision, end, ended, living
from tuneward_operator.observe import Seen
from tuneward_operator.status import Say
from tuneward_operator.views import JobView, instant

DEFAULT_TTL_SECONDS = 86_400


def suspend(context: Context) -> Decision:
    context, jobs = _stop(context, "suspended")
    if jobs or _pods_left(context.seen):
        message = "saving a checkpoint and freeing the workers"
        say = Say(phase=Phase.SUSPENDED, reason=Reason.SUSPENDED, message=message, at_rest=False)
        return context.say(say, delete=_recorded(context, jobs), wake=_soon(context, jobs))
    message = "suspended; set spec.suspend to false to go on"
    return context.say(Say(phase=Phase.SUSPENDED, reason=Reason.SUSPENDED, message=message))


def cancel(context: Context) -> Decision:
    context, jobs = _stop(context, "cancelled")
    if jobs or _pods_left(context.seen):
        message = "ending the workers"
        say = Say(phase=Phase.CANCELLING, reason=Reason.CANCELLING, message=message, at_rest=False)
        return context.say(say, delete=_recorded(context, jobs), wake=_soon(context, jobs))
    return end(context, Phase.CANCELLED, Reason.CANCELLED, "cancelled by spec.cancel; checkpoints stay in the run directory")


def _stop(context: Context, cause: str) -> tuple[Context, tuple[JobView, ...]]:
    """Records the end of what runs. Also gives the Jobs that are still there to be deleted."""
    seen = context.seen
    if seen.gang is not None:
        context = ended(context, seen.gang.launch, cause)
    context = replace(context, status=texts.close(context.status, cause)).with_status(retry_at=None)
    helpers = [helper for helper in (seen.prepare, seen.finish) if helper is not None]
    # One whose failure was counted goes too: nothing shall count it again when the job goes on.
    doomed = [helper.job for helper in helpers if not helper.ended or seen.status.retry_at]
    return context, (*seen.attempts, *doomed)


def _recorded(context: Context, jobs: tuple[JobView, ...]) -> tuple[JobView, ...]:
    """A launch's Job goes only after the write that counted it."""
    counted = context.seen.status.launches or 0
    return living([job for job in jobs if job.launch <= counted])


def _soon(context: Context, jobs: tuple[JobView, ...]) -> float:
    uncounted = any(job.launch > (context.seen.status.launches or 0) for job in jobs)
    return 0.0 if uncounted else LOOK_AGAIN_SECONDS


def _pods_left(seen: Seen) -> bool:
    return seen.helpers_left or any(worker.left for worker in seen.workers)


def after_the_end(context: Context) -> Decision:
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
        delete=living(doomed),
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
    since = instant(context.status.finished_at) or context.now
    return (since - context.now).total_seconds() + (DEFAULT_TTL_SECONDS if ttl is None else ttl)
