"""What a step's numbers mean for all ranks: a stop, a later attempt, a divergence.

A rank's flags ride on the reduced vector, so every rank sees the same ones after the same step and ends the same way.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import torch

from tuneward_trainer import defaults, divergence, endings, rundir
from tuneward_trainer.session import Session

_FENCE_SECONDS: Final = 2.0
_WIDE: Final = 1 << 20
"""A document's index rides on the reduced vector as two floats below this."""

logger = logging.getLogger("tuneward_trainer")


# -- what rides on the reduced vector ----------------------------------------------------------------------------------


def flags_of(session: Session, outputs: list[Any]) -> torch.Tensor:
    """float32 [6]: asked to stop, a later attempt's number, the first document whose loss is not finite, plus 1, in two
    parts, how many of these there are, and how many documents in all."""
    fence = 0.0
    if session.gang.leads and time.monotonic() - session.fenced_at >= _FENCE_SECONDS:
        session.fenced_at = time.monotonic()
        fence = float(rundir.superseded(session.run, session.attempt) or 0)
    bad = [document for output, batch in outputs for document in _not_finite(output, batch)]
    first = 1 + bad[0] if bad else 0
    documents = sum(batch.documents for _, batch in outputs)
    return torch.tensor([float(session.stop.asked), fence, first // _WIDE, first % _WIDE, len(bad), documents])


def _not_finite(output: Any, batch: Any) -> list[int]:
    """Documents with a row whose part of the loss is not finite."""
    wrong = torch.nonzero(~torch.isfinite(output.logprobs.cpu() * batch.weights))[:, 0].tolist()
    return list(dict.fromkeys(batch.source_of_row(row) for row in wrong))


def heed(session: Session, flags: torch.Tensor, step: int) -> None:
    """Does what any rank's flags ask for. All ranks see the same flags of the same step."""
    rows = flags.cpu()
    stop, fence = rows[:, :2].max(0).values.tolist()
    if fence:
        raise endings.FencedError(f"attempt {int(fence)} has begun; attempt {session.attempt} gives way to it")
    bad, documents = (int(count) for count in rows[:, 4:].sum(0).tolist())
    if bad:
        high, low = next(row[2:4] for row in rows.tolist() if row[4])
        first = session.training[int(high) * _WIDE + int(low) - 1]
        which = f"sample {first.file}:{first.line}"
        which = which if bad == 1 else f"{bad} of {documents} samples, the first {which.removeprefix('sample ')}"
        look = "look at that sample, or " if bad < documents else ""
        raise give_up(session, f"the loss is not finite at step {step + 1} ({which})", look, state=step, learnt=step)
    session.stopped = bool(stop)


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
    remedy = divergence.damaged_weights(session.engine.model)
    if remedy is None and not state:
        remedy = f"{look}name another spec.model.uri: the base model itself gives it, nothing was learnt yet"
    if remedy is None:
        usual = defaults.learning_rate(prepared.base.parameters, prepared.objective.type, prepared.method.type)
        remedy = look + divergence.advice(prepared.hyperparameters.learning_rate, usual)
    named = f"; samples of step {learnt + 1}: {divergence.listing(samples)}" if learnt is not None else ""
    return endings.DivergedError(f"{what}; {remedy}{named}")
