"""What status says: conditions, attempts, progress. Pure; nothing here decides what happens next."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeGuard

from tuneward_api.conditions import FINAL_PHASES, Condition, ConditionType, Phase, Reason
from tuneward_api.files import Plan, Progress, Result, SavedCheckpoint
from tuneward_api.finetunejob import AttemptStatus, CheckpointStatus, FineTuneJobStatus, ProgressStatus
from tuneward_api.names import LABEL_SERVER, MAX_MESSAGE
from tuneward_api.resolved import ParentModel, Resolved, ResolvedBase
from tuneward_api.trackers import TrackerState, TrackerStatus
from tuneward_operator.observe import Seen, Worker
from tuneward_operator.views import instant

SHOWN_ATTEMPTS = 10
MAX_CAUSE = 512
SUCCEEDED = "Succeeded"
"""Cause of the attempt that came to its end."""


Truth = tuple[bool | None, str, str]
"""Whether a condition holds (None: unknown), its reason and its message."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """One state in the words of status. `at_rest` False: something of ours is still to be applied or to go."""

    phase: Phase
    reason: Reason
    message: str
    at_rest: bool = True
    stalled: bool = False
    stale: bool = False


def stamp(now: datetime) -> str:
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def conclude(seen: Seen, status: FineTuneJobStatus, say: Say, now: datetime) -> FineTuneJobStatus:
    """`status` with phase, message and every condition as `say` has it."""
    progress = status.progress
    if progress is not None and say.phase != Phase.RUNNING:
        # Nothing advances: a time to the end would be a promise.
        progress = progress.model_copy(update={"eta": None, "eta_seconds": None})
    return status.model_copy(
        update={
            "phase": say.phase,
            "message": say.message[:MAX_MESSAGE],
            "progress": progress,
            "conditions": conditions(seen, status, say, now),
            "observed_generation": seen.generation,
            "queue": seen.owner.queue,
        }
    )


def mirrored(seen: Seen, now: datetime) -> FineTuneJobStatus:
    """After the end everything stays as it was said, but whether the model is served can still change."""
    update: dict[str, Any] = {"observed_generation": seen.generation}
    if seen.owner.spec.serve is not None and seen.status.phase == Phase.SUCCEEDED:
        known = [found for found in seen.status.conditions or () if found.type != ConditionType.SERVED]
        before = [found for found in seen.status.conditions or () if found.type == ConditionType.SERVED]
        served = make_condition(
            ConditionType.SERVED, _served(seen, seen.owner.spec.serve.server), before, seen.generation, now
        )
        update["conditions"] = [*known, served]
    return seen.status.model_copy(update=update)


def conditions(seen: Seen, status: FineTuneJobStatus, say: Say, now: datetime) -> list[Condition]:
    """All types, always in the same order; a time moves only when the truth of its condition does."""
    before = seen.status.conditions or []
    return [make_condition(kind, truth, before, seen.generation, now) for kind, truth in _truths(seen, status, say).items()]


def make_condition(kind: ConditionType, truth: Truth, before: list[Condition], generation: int, now: datetime) -> Condition:
    holds, reason, message = truth
    value: Literal["True", "False", "Unknown"] = "Unknown" if holds is None else "True" if holds else "False"
    since = [known.last_transition_time for known in before if known.type == kind and known.status == value]
    return Condition(
        type=str(kind),
        status=value,
        reason=str(reason),
        message=message[:MAX_MESSAGE],
        last_transition_time=since[0] if since else stamp(now),
        observed_generation=generation,
    )


def _truths(seen: Seen, status: FineTuneJobStatus, say: Say) -> dict[ConditionType, Truth]:
    final = say.phase in FINAL_PHASES
    plain: dict[ConditionType, bool | None] = {
        ConditionType.RECONCILING: not say.at_rest and not final,
        ConditionType.STALLED: say.stalled or say.phase in (Phase.FAILED, Phase.CANCELLED),
        ConditionType.ADMITTED: say.phase in (Phase.STARTING, Phase.RUNNING),
        ConditionType.RUNNING: say.phase == Phase.RUNNING,
        ConditionType.SUSPENDED: say.phase == Phase.SUSPENDED and say.at_rest,
        ConditionType.COMPLETE: say.phase == Phase.SUCCEEDED,
        ConditionType.FAILED: say.phase == Phase.FAILED,
        ConditionType.FINISHED: final,
    }
    found: dict[ConditionType, Truth] = {
        kind: (truth, say.reason, say.message if truth else "") for kind, truth in plain.items()
    }
    found[ConditionType.ACCEPTED] = _accepted(status, say)
    if say.stale:
        found[ConditionType.RUNNING] = (True, Reason.PROGRESS_STALE, say.message)
    if seen.owner.spec.serve is not None:
        found[ConditionType.SERVED] = _served(seen, seen.owner.spec.serve.server)
    return found


def _accepted(status: FineTuneJobStatus, say: Say) -> Truth:
    if status.resolved is not None:
        return True, Reason.VALIDATED, "the model and the data were checked"
    if say.phase == Phase.FAILED:
        return False, say.reason, say.message
    return None, Reason.VALIDATING, ""


def _served(seen: Seen, server: str) -> Truth:
    if seen.served is None:
        return False, Reason.NOT_SERVED, f"ModelServer {server} does not serve the model yet"
    if seen.model_server != server:
        named = f"names {seen.model_server}" if seen.model_server else "is not there"
        return (
            False,
            Reason.NOT_SERVED,
            f"the model's label {LABEL_SERVER} {named}; set it to {server} to have it served there",
        )
    return seen.served.ready, seen.served.reason, seen.served.message


def resolved_of(plan: Plan) -> Resolved:
    prepared, parent = plan.prepared, plan.request.parent
    return Resolved(
        base=ResolvedBase(
            uri=prepared.base.uri,
            key=prepared.base.key,
            digest=prepared.base.digest,
            architecture=prepared.base.architecture,
            parameters=prepared.base.parameters,
        ),
        parent=None if parent is None else ParentModel(name=parent.name, digest=parent.artifact_digest),
        data=prepared.data.summary,
        objective=prepared.objective,
        method=prepared.method,
        hyperparameters=prepared.hyperparameters,
        bins_per_micro_batch=prepared.bins_per_micro_batch,
        estimate=prepared.estimate,
        packing=prepared.packing,
        base_weights=prepared.base_weights,
        images={"trainer": plan.request.images.trainer},
    )


# Attempts


def absorb(seen: Seen, now: datetime, *, progress_every: float) -> FineTuneJobStatus:
    """The seen status with whatever leaders have said since: attempts, checkpoint, progress."""
    status = seen.status
    attempts = {(entry.number, entry.pod_uid): entry for entry in status.attempts or ()}
    progress = _progress(seen, now, progress_every)
    trackers = status.trackers
    for worker in seen.workers:
        if worker.index == 0:
            _absorb_progress(
                attempts, worker, at_most=progress.step if progress is not None and _calm(seen, worker) else None
            )
            _absorb_result(attempts, worker)
            trackers = _trackers_of(worker) or trackers
    newest = sorted(attempts.values(), key=lambda entry: entry.number)[-SHOWN_ATTEMPTS:]
    count = max([entry.number for entry in newest] + [status.attempt_count or 0])
    return status.model_copy(
        update={
            "attempts": newest or None,
            "attempt_count": count or None,
            "checkpoint": _checkpoint(status.checkpoint, seen.workers, count),
            "progress": progress,
            "trackers": trackers,
        }
    )


def _trackers_of(worker: Worker) -> list[TrackerStatus]:
    """What it said last: its result, else its progress."""
    heard = worker.heard.progress.trackers if worker.heard is not None else []
    said: list[TrackerState] = (worker.result.trackers if worker.result is not None else []) or heard
    return [
        TrackerStatus(name=known.name[:16], url=known.url[:512] or None, message=known.message[:512] or None)
        for known in said[:4]
    ]


Attempts = dict[tuple[int, str], AttemptStatus]


def _calm(seen: Seen, worker: Worker) -> bool:
    """Whether the attempt goes on, so that its last step can wait for the next progress that is written."""
    gang = seen.gang
    running = gang is not None and gang.outcome == "Running" and not gang.suspended and not gang.lost_workers
    return running and worker.phase == "Running" and not (seen.owner.spec.suspend or seen.owner.spec.cancel)


def _absorb_progress(attempts: Attempts, worker: Worker, *, at_most: int | None) -> None:
    said = worker.heard.progress if worker.heard is not None else None
    if said is None or said.attempt < 1:
        return
    entry = _entry(attempts, said.attempt, worker.uid, worker)
    attempts[said.attempt, worker.uid] = entry.model_copy(
        update={
            "from_step": said.from_step,
            "last_step": max(entry.last_step or 0, said.step if at_most is None else min(said.step, at_most)),
            "resume": said.resume[:256],
        }
    )


def _absorb_result(attempts: Attempts, worker: Worker) -> None:
    """A result may be of an earlier attempt: a trainer that finds a terminal one reports it again."""
    said = worker.result
    if said is None or said.attempt < 1:
        return
    entry = _entry(attempts, said.attempt, said.pod_uid or worker.uid, worker)
    saved = said.checkpoint.step if said.checkpoint is not None else said.from_step
    if _diverged(said) and said.checkpoint is None:
        saved = 0
    update: dict[str, Any] = {"from_step": said.from_step, "last_step": said.step, "resume": said.resume[:256]}
    if entry.cause is not None and said.outcome != "Succeeded":
        update["lost_steps"] = max(0, said.step - saved)
    attempts[said.attempt, entry.pod_uid] = entry.model_copy(update=update)


def _entry(attempts: Attempts, number: int, pod_uid: str, worker: Worker) -> AttemptStatus:
    return attempts.get((number, pod_uid)) or AttemptStatus(
        number=number,
        launch=max(1, worker.launch),
        pod_uid=pod_uid,
        node=worker.node or None,
        started_at=stamp(worker.started_at) if worker.started_at is not None else None,
    )


def _checkpoint(known: CheckpointStatus | None, workers: tuple[Worker, ...], newest: int) -> CheckpointStatus | None:
    """The newest that was told of. A divergence alone takes some away, and its result names what is left; that of an
    attempt before the `newest` is past."""
    for leader in (worker for worker in workers if worker.index == 0):
        if _diverged(leader.result) and leader.result.attempt == newest:
            return _newer(None, leader.result.checkpoint)
        if not _diverged(leader.result):
            known = _newer(known, _checkpoint_of(leader))
    return known


def _checkpoint_of(worker: Worker) -> SavedCheckpoint | None:
    said = [worker.result.checkpoint if worker.result else None, worker.heard.progress.checkpoint if worker.heard else None]
    return max((found for found in said if found is not None), key=lambda found: found.step, default=None)


def _newer(known: CheckpointStatus | None, saved: SavedCheckpoint | None) -> CheckpointStatus | None:
    if saved is None or (known is not None and known.step >= saved.step):
        return known
    return CheckpointStatus(step=saved.step, digest=saved.digest, saved_at=saved.saved_at)


def _diverged(said: Result | None) -> TypeGuard[Result]:
    return said is not None and said.reason == Reason.NUMERICAL_DIVERGENCE


def close(status: FineTuneJobStatus, cause: str, *, alive: frozenset[str] = frozenset()) -> FineTuneJobStatus:
    """Ends every open attempt whose leader is not `alive` (pod uids)."""
    attempts = [
        entry if entry.cause is not None or entry.pod_uid in alive else _closed(entry, cause, status.checkpoint)
        for entry in status.attempts or ()
    ]
    return status.model_copy(update={"attempts": attempts or None})


def _closed(entry: AttemptStatus, cause: str, checkpoint: CheckpointStatus | None) -> AttemptStatus:
    """Steps after the last checkpoint are done again by the next attempt, unless there is none."""
    saved = max(checkpoint.step if checkpoint is not None else 0, entry.from_step or 0)
    lost = None if cause == SUCCEEDED else max(0, (entry.last_step or 0) - saved)
    return entry.model_copy(update={"cause": cause[:MAX_CAUSE], "lost_steps": lost})


def open_attempts(status: FineTuneJobStatus, *, alive: frozenset[str] = frozenset()) -> list[AttemptStatus]:
    return [entry for entry in status.attempts or () if entry.cause is None and entry.pod_uid not in alive]


def progressed(status: FineTuneJobStatus) -> bool:
    """Whether the newest attempt came further than it began."""
    return any((newest.last_step or 0) > (newest.from_step or 0) for newest in (status.attempts or [])[-1:])


# Progress


def _progress(seen: Seen, now: datetime, every: float) -> ProgressStatus | None:
    """What the leader said last; what was written lately and is less than a percent old stays."""
    leader = seen.gang.leader if seen.gang is not None else None
    heard = leader.heard if leader is not None else None
    before = seen.status.progress
    if leader is not None and leader.result is not None and leader.result.outcome == "Succeeded":
        return _done(before, leader.result, now)
    if heard is None or heard.progress.steps < 1:
        return before
    after = progress_status(heard.progress, heard.at)
    if before is None or (before.percent, before.steps) != (after.percent, after.steps):
        return after
    age = now - (instant(before.observed_at) or now)
    return after if age >= timedelta(seconds=every) else before


def _done(before: ProgressStatus | None, result: Result, now: datetime) -> ProgressStatus | None:
    """The last look at a leader misses its last steps; the result does not."""
    if result.steps < 1 or (before is not None and before.step >= result.step):
        return before
    said = Progress(step=result.step, steps=result.steps, train_loss=result.metrics.train_loss)
    last = progress_status(said, now)
    kept = ("epoch", "validation_loss", "reward_margin", "reward_accuracy", "tokens_per_second", "memory_bytes", "mfu")
    return last if before is None else last.model_copy(update={name: getattr(before, name) for name in kept})


def progress_status(said: Progress, at: datetime) -> ProgressStatus:
    """`summary`, `loss` and `eta` are texts because a column can show no formatted number."""
    step = min(said.step, said.steps)
    return ProgressStatus(
        step=step,
        steps=said.steps,
        percent=step * 100 // said.steps,
        summary=f"{step}/{said.steps}",
        epoch=said.epoch,
        train_loss=said.train_loss,
        loss=None if said.train_loss is None else f"{said.train_loss:.3f}"[:16],
        validation_loss=said.validation_loss,
        reward_margin=said.reward_margin,
        reward_accuracy=said.reward_accuracy,
        tokens_per_second=said.tokens_per_second,
        eta_seconds=said.eta_seconds,
        memory_bytes=said.memory_bytes,
        mfu=said.mfu,
        eta=None if said.eta_seconds is None else in_words(said.eta_seconds),
        observed_at=stamp(at),
    )


def in_words(seconds: int) -> str:
    """3725 -> 1h2m, as kubectl writes ages."""
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600}h"
