"""Judging a gang: whether it runs, what ended it, and what it waits for. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from typing import Final

from tuneward_api.conditions import FailureClass, Phase, Reason
from tuneward_api.failures import Failure, classify, hang
from tuneward_api.finetunejob import RunPolicy
from tuneward_api.names import DEFAULT_HANG_SECONDS
from tuneward_operator import waiting
from tuneward_operator.observe import Gang, Seen, Worker, disrupted, told
from tuneward_operator.views import JobView

MAX_WAIT_REASON: Final = 300

DELETED: Final = Failure(
    failure_class=FailureClass.INFRASTRUCTURE,
    reason=Reason.INFRASTRUCTURE,
    sentence="the workers' Job was deleted by somebody else",
)

# The end of one worker takes the others with it: they are told to stop, or lose their connection and ask for another try.
# So the most telling end is the cause, not the first one seen.
_TELLING: Final = {
    FailureClass.INFRASTRUCTURE: 3,
    FailureClass.UNKNOWN: 2,
    FailureClass.PREEMPTED: 4,
}


def trained(seen: Seen) -> bool:
    """Whether the training is over and only the filing is left, which no suspension saves anything of."""
    over = seen.gang is not None and seen.gang.outcome == "Succeeded"
    return seen.status.resolved is not None and (over or seen.status.phase == Phase.REGISTERING)


def running(gang: Gang, replicas: int) -> bool:
    up = [worker for worker in gang.workers if worker.phase in ("Running", "Succeeded")]
    return len(up) >= replicas


def over(job: JobView, workers: Iterable[Worker]) -> bool:
    """Whether an attempt Job has ended, or is about to since one of its workers has failed."""
    if job.conditions.keys() & {"Complete", "SuccessCriteriaMet", "Failed", "FailureTarget"}:
        return True
    return any(worker.launch == job.launch and worker.phase == "Failed" for worker in workers)


def failure(gang: Gang, now: datetime, policy: RunPolicy, replicas: int) -> Failure | None:
    """What ended the gang, or why it has to end; None: it goes on."""
    if gang.job.deleting_since is not None:
        return DELETED
    lost = gang.lost_workers
    if lost:
        return min((_telling(worker, replicas) for worker in lost), key=lambda found: found[0])[1]
    if gang.outcome == "Failed":
        return classify(exit_code=None)
    if not gang.suspended and not running(gang, replicas) and waiting.start_left(gang.job, now, policy) <= 0:
        return waiting.too_late("the gang", _how_far(gang, replicas, now), policy, resources="spec.workers.resources")
    return _hang(gang.leader, policy)


def _hang(leader: Worker | None, policy: RunPolicy) -> Failure | None:
    """By the leader's own word: one that does not answer is stale, and one that loads or evaluates is busy."""
    heard = leader.heard if leader is not None else None
    seconds = policy.hang_timeout_seconds or DEFAULT_HANG_SECONDS
    if heard is None or heard.progress.phase != "Training" or (heard.at - heard.moved_at).total_seconds() < seconds:
        return None
    return hang(step=heard.progress.step, seconds=seconds)


def _telling(worker: Worker, replicas: int) -> tuple[int, Failure]:
    result = worker.result
    said = result.reason if result is not None and result.outcome != "Succeeded" else None
    disruption = disrupted(worker.disruption)
    known = classify(
        exit_code=worker.exit_code,
        reason=said or disruption or worker.reason,
        message=result.message if result is not None else told(worker.message),
    )
    if replicas > 1:
        known = replace(known, sentence=f"worker {worker.index}: {known.sentence}")
    return (1 if disruption and not said else _TELLING.get(known.failure_class, 0)), known


def start_message(gang: Gang, replicas: int, now: datetime) -> str:
    said = _how_far(gang, replicas, now)
    return said + waiting.hint(said)


def _how_far(gang: Gang, replicas: int, now: datetime) -> str:
    up = sum(worker.phase in ("Running", "Succeeded") for worker in gang.workers)
    why = next(
        (worker.message or worker.reason for worker in gang.workers if worker.phase == "Pending" and worker.message), ""
    )
    if not gang.workers:
        why = waiting.no_pod(gang.job, now)
    return f"{up} of {replicas} workers run" + (f"; {why[:MAX_WAIT_REASON]}" if why else "")


def next_look(gang: Gang, now: datetime, policy: RunPolicy) -> float:
    """Seconds until the clock alone may change what is said of a gang that starts."""
    left = waiting.start_left(gang.job, now, policy)
    return left if gang.workers else min(left, waiting.NO_POD_SECONDS)


def stale(leader: Worker | None, now: datetime, after: float) -> bool:
    """No answer for too long. Not a hang: what lies between the leader and us may be at fault."""
    if leader is None or leader.started_at is None:
        return False
    last = leader.heard.at if leader.heard is not None else leader.started_at
    return (now - max(last, leader.started_at)).total_seconds() > after
