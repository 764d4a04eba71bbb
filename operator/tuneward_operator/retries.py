"""What failed is tried again, as often as its class allows, with a growing wait between. Pure."""

from __future__ import annotations

from datetime import timedelta

from tuneward_api.conditions import FailureClass, Phase, Reason
from tuneward_api.failures import DEFAULT_RETRIES, Failure
from tuneward_api.finetunejob import RunPolicy
from tuneward_operator import status as texts
from tuneward_operator.decision import Context, Decision, end
from tuneward_operator.status import Say, stamp
from tuneward_operator.views import instant

LONGEST_RETRY_SECONDS = 300.0


def retry(context: Context, failure: Failure, *, to: Phase) -> Decision:
    """Spends one retry of the failure's class, or ends the job where there is none left."""
    kind = failure.failure_class
    spent = (context.status.retries or {}).get(kind, 0)
    budget = _budget(context.policy, kind)
    if spent >= budget:
        if budget == 0 or spent == 0:
            return end(context, Phase.FAILED, failure.reason, failure.sentence)
        often = "once" if spent == 1 else f"{spent} times"
        message = f"{failure.sentence} (tried again {often}, spec.runPolicy.retries allows no more for {kind})"
        return end(context, Phase.FAILED, Reason.RETRIES_EXHAUSTED, message)
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


def until_retry(context: Context) -> float:
    due = instant(context.status.retry_at)
    return 0.0 if due is None else (due - context.now).total_seconds()


def restarting(context: Context, say: Say) -> Say:
    """The sentence that says what failed stays until the next try has begun."""
    if not context.status.retry_at:
        return say
    phase = Phase.REGISTERING if say.phase == Phase.REGISTERING else Phase.RECOVERING
    return Say(phase=phase, reason=Reason.RESTARTING, message=context.seen.status.message or say.message, at_rest=False)
