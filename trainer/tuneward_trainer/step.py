"""One optimizer step, in which the host never waits for the device; and what its numbers say, once they are there.

All numbers of a step that the host must see (losses, gradient norm, every rank's flags) are one small tensor with one copy.
On a GPU they are read when the first micro-batch of the next step has been queued: the device has work while the host tells,
judges and saves, and nothing of the next step is applied before the last one is known to be good. So a stop, a divergence
and a checkpoint mean the same step as on a CPU, where numbers are read at once; what a step that is not made has computed
already is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneward_trainer.batch import Batch
from tuneward_trainer.distributed import TreeSum
from tuneward_trainer.feed import Feed, Outline
from tuneward_trainer.patches import Forward
from tuneward_trainer.session import Session
from tuneward_trainer.verdict import FLAGS, flags_of, heed, judge


class Arrival:
    """Numbers on their way to the host, by one copy."""

    def __init__(self, numbers: Tensor) -> None:
        # Of a GPU's tensor the copy is in pinned memory, and only the event says that it is there.
        self._host = numbers.to("cpu", non_blocking=True)
        self._there: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> list[float]:
        """Waits for them: the one place where a training step does."""
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._host.tolist()
        return found


@dataclass(frozen=True)
class Begun:
    """A step of which some micro-batches have been queued."""

    outline: Outline
    tree: TreeSum
    scored: list[tuple[Tensor, Batch]]
    """Log-probabilities of the targets, and what they are of."""


@dataclass(frozen=True)
class Done:
    """A step whose update has been queued."""

    outline: Outline
    scored: list[tuple[Tensor, Batch]]
    learning_rate: float
    arrival: Arrival


def begin_step(session: Session, forward: Forward, feed: Feed) -> Begun:
    """Queues its first micro-batch. All ranks do, where a pass is one of all: an evaluation may come before the others."""
    outline = feed.outline()
    begun = Begun(outline, TreeSum(outline.leaves), [])
    if outline.places:
        _one_micro_batch(session, forward, feed, begun)
    elif session.idles(outline.leaves):
        session.engine.idle(forward)
    return begun


def finish_step(session: Session, forward: Forward, feed: Feed, begun: Begun) -> Done:
    """Queues the others, the sum over all ranks and the update."""
    engine, gang, outline = session.engine, session.gang, begun.outline
    for _ in outline.places[1:]:
        _one_micro_batch(session, forward, feed, begun)
    if outline.places and session.idles(outline.leaves):
        engine.idle(forward)
    size = len(engine.gradient) + len(session.loss.figures)
    summed, flags = gang.sum_tree(begun.tree, outline.leaves, flags_of(session, begun.scored), size=size)
    learning_rate = session.schedule.learning_rate(outline.step)
    norm = engine.optim_step(learning_rate, summed[: len(engine.gradient)])
    numbers = torch.cat([summed[len(engine.gradient) :], norm[None], flags.flatten()])
    return Done(outline, begun.scored, learning_rate, Arrival(numbers))


def _one_micro_batch(session: Session, forward: Forward, feed: Feed, begun: Begun) -> None:
    engine, ready = session.engine, feed.micro_batch()
    dropout = session.plan.prepared.method.dropout
    seed = session.schedule.seed(begun.outline.step, ready.place) if dropout else None
    output = engine.forward_backward(forward, ready.batch, session.loss, seed=seed)
    begun.tree.add((ready.place, ready.place + 1), torch.cat([engine.gradient, output.figures.float()]))
    engine.gradient.zero_()
    begun.scored.append((output.logprobs, ready.batch))


def outcome(session: Session, done: Done) -> dict[str, Any]:
    """The step's figures by name. Waits for them; raises DivergedError or FencedError on all ranks at once."""
    numbers, names = done.arrival.read(), session.loss.figures
    (loss, *others), norm, flags = numbers[: len(names)], numbers[len(names)], numbers[len(names) + 1 :]
    heed(session, [flags[start : start + FLAGS] for start in range(0, len(flags), FLAGS)], done.scored, done.outline.step)
    judge(session, done.outline.step, loss=loss, norm=norm)
    figures = {"train_loss": loss, **dict(zip(names[1:], others, strict=True))}
    return {**figures, "learning_rate": done.learning_rate, "grad_norm": norm, "tokens": done.outline.tokens}
