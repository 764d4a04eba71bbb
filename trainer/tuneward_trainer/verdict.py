"""What a step's numbers mean for all ranks: a stop, a later attempt, a divergence.

A rank's flags ride on the reduced vector, so every rank sees the same ones after the same step and ends the same way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tuneward_trainer import defaults, divergence, endings, rundir
from tuneward_trainer.batch import Batch, moved
from tuneward_trainer.session import Session

Scored = Sequence[tuple[Tensor, Batch]]
"""Of each micro-batch of this rank: log-probabilities of its targets [R], and what they are of, both on the device."""

FLAGS: Final = 4
"""Numbers of each rank that ride on the reduced vector."""
_FENCE_SECONDS: Final = 2.0

logger = logging.getLogger("tuneward_trainer")


# -- what rides on the reduced vector ----------------------------------------------------------------------------------


def flags_of(session: Session, scored: Scored) -> Tensor:
    """float32 [FLAGS] on the device: asked to stop, a later attempt's number, documents, and rows whose part of the loss is
    not finite."""
    fence = 0.0
    if session.gang.leads and time.monotonic() - session.fenced_at >= _FENCE_SECONDS:
        session.fenced_at = time.monotonic()
        fence = float(rundir.superseded(session.run, session.attempt) or 0)
    documents = sum(batch.documents for _, batch in scored)
    known = moved(torch.tensor([float(session.stop.asked), fence, documents]), session.gang.device)
    bad = [_not_finite(logprobs, batch).sum() for logprobs, batch in scored]
    return torch.cat([known, torch.stack(bad).sum().float()[None] if bad else known.new_zeros(1)])


def _not_finite(logprobs: Tensor, batch: Batch) -> Tensor:
    """bool [R]."""
    return ~torch.isfinite(logprobs * batch.weights)


def heed(session: Session, flags: list[list[float]], scored: Scored, step: int) -> None:
    """Does what any rank's flags (FLAGS of each) ask for. All ranks see the same flags of the same step."""
    stop, fence = max(row[0] for row in flags), max(row[1] for row in flags)
    if fence:
        raise endings.FencedError(f"attempt {int(fence)} has begun; attempt {session.attempt} gives way to it")
    if any(row[3] for row in flags):
        # Rare, and the end of this attempt: now ranks may wait, and tell each other.
        bad = session.gang.gather(_bad_documents(scored))
        documents = int(sum(row[2] for row in flags))
        first = session.training[bad[0]]
        which = f"sample {first.file}:{first.line}"
        which = which if len(bad) == 1 else f"{len(bad)} of {documents} samples, the first {which.removeprefix('sample ')}"
        look = "look at that sample, or " if len(bad) < documents else ""
        raise give_up(session, f"the loss is not finite at step {step + 1} ({which})", look, state=step, learnt=step)
    session.stopped = bool(stop)


def _bad_documents(scored: Scored) -> list[int]:
    """Indices in the data, in the order of this rank's micro-batches."""
    found = []
    for logprobs, batch in scored:
        rows = torch.nonzero(_not_finite(logprobs, batch))[:, 0].tolist()
        found += list(dict.fromkeys(batch.source_of_row(row) for row in rows))
    return found


# -- divergence: no rank sees another number than the others do --------------------------------------------------------


def judge(session: Session, step: int, *, loss: float, norm: float) -> None:
    """Whether the step just done (`step` from 0) was the last one that makes sense. Raises DivergedError."""
    watch = session.watch
    if norm - norm != 0 or loss - loss != 0:
        what = "gradient" if loss - loss == 0 else "loss"
        raise give_up(session, f"the {what} is not finite at step {step + 1}", state=step, learnt=step)
    last = step + 1 == session.plan.prepared.hyperparameters.steps
    if watch.see(loss, last=last):
        found = step + 1 - len(watch.suspects)
        # The loss of a step is that of the update before it.
        raise give_up(session, divergence.exploded(watch, step=step + 1), state=found, learnt=found - 1)
    if watch.suspected and session.gang.leads:
        logger.warning(
            "step %d: loss %.4g is far above %.4g: nothing is saved until it falls", step + 1, loss, watch.highest
        )


def give_up(session: Session, what: str, look: str = "", *, state: int, learnt: int | None = None) -> endings.DivergedError:
    """`state`: the number of updates that gave the bad loss; the next try shall not begin with it. `learnt`: the step,
    from 0, whose samples are to be named."""
    groups = session.schedule.micro_batches(learnt) if learnt is not None else []
    samples = [session.training[index] for group in groups for index in group]
    if session.saver is not None:
        session.saver.discard(state)
        session.reporter.update(checkpoint=session.saver.last)
    if session.gang.leads:
        rundir.leave(session.run, session.attempt, "diverged.json", divergence.record(what, session.watch, samples))
    prepared = session.plan.prepared
    # All ranks are here, and say the same.
    found = session.gang.gather([divergence.damaged_weights(session.engine.model)])
    remedy = next(filter(None, found), None)
    if remedy is None and not state:
        remedy = f"{look}name another spec.model.uri: the base model itself gives it, nothing was learnt yet"
    if remedy is None:
        usual = defaults.learning_rate(prepared.base.parameters, prepared.objective.type, prepared.method.type)
        remedy = look + divergence.advice(prepared.hyperparameters.learning_rate, usual)
    named = f"; samples of step {learnt + 1}: {divergence.listing(samples)}" if learnt is not None else ""
    return endings.DivergedError(f"{what}; {remedy}{named}")
