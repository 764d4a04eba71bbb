"""The next micro-batches, made ready while the device is at work on those before.

A thread reads documents, packs them, pins the result and queues its copy to the device, a few micro-batches ahead and across
the ends of steps, so that neither a step's end nor an evaluation leaves the device without work. What it makes is a function
of the plan and the step alone: a checkpoint knows nothing of it, and after a kill it begins where the engine does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

import torch

from tuneward_trainer.batch import Batch, collate, padded
from tuneward_trainer.distributed import share
from tuneward_trainer.session import Session

AHEAD: Final = 2
"""Micro-batches that wait for the device; each is some hundred kilobytes."""


@dataclass(frozen=True)
class Outline:
    """What a rank must know of a step (from 0) besides its own micro-batches."""

    step: int
    leaves: int
    """Micro-batches of all ranks."""
    places: range
    """Those of this rank among them."""
    tokens: int
    """Of all ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """On the device, or on its way there; weights are shares of the step's whole."""

    place: int
    batch: Batch
    copied: torch.cuda.Event | None = None
    """When it is all there; None on a CPU."""


def outlined(session: Session, step: int) -> Iterator[Outline | MicroBatch]:
    """The outline of step `step` (from 0), then this rank's micro-batches, in order."""
    gang, loss, training = session.gang, session.loss, session.training
    groups = session.micro_batches(step)
    documents = [index for group in groups for index in group]
    total = loss.total(training[index] for index in documents) or 1.0
    places = share(len(groups), gang.rank, gang.world)
    yield Outline(step, len(groups), places, sum(int(training.lengths[index]) for index in documents))
    for place in places:
        batch = collate(((index, training[index]) for index in groups[place]), longest=session.row_limit)
        if session.row_length and batch.documents:
            batch = padded(batch, session.row_length)
        yield MicroBatch(place, batch.scaled(1 / total))


class Feed:
    """`items` in their order, of which `AHEAD` are ready. Use as a context manager; the thread ends with it."""

    def __init__(self, items: Iterable[Outline | MicroBatch], device: torch.device) -> None:
        self._items = items
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._room = threading.Semaphore(AHEAD)
        self._closed = False
        # It may be in a read of a file that never ends, which must not keep the process.
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)

    @classmethod
    def of(cls, session: Session) -> Self:
        """From the engine's step to the last one."""
        steps = range(session.engine.step, session.plan.prepared.hyperparameters.steps)
        return cls((item for step in steps for item in outlined(session, step)), session.gang.device)

    def outline(self) -> Outline:
        """Of the next step. Raises what went wrong with its data."""
        found: Outline = self._take()
        return found

    def micro_batch(self) -> MicroBatch:
        """The step's next one. What the device is told from now on comes after the copy; the host does not wait."""
        found: MicroBatch = self._take()
        if found.copied is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(found.copied)
            for tensor in found.batch.tensors.values():
                # Its memory belongs to the stream of copies, which must not write there before this one has read.
                tensor.record_stream(here)
        return found

    def _take(self) -> Any:
        item = self._ready.get()
        self._room.release()
        if isinstance(item, Exception):
            raise item
        return item

    def _work(self) -> None:
        try:
            # Which GPU and stream are meant is known to each thread by itself.
            with torch.cuda.device(self._device) if self._stream is not None else nullcontext():
                for item in self._items:
                    self._room.acquire()
                    if self._closed:
                        return
                    self._ready.put(self._sent(item) if isinstance(item, MicroBatch) else item)
        except Exception as error:  # noqa: BLE001 - it is raised where the item would have been used
            self._ready.put(error)

    def _sent(self, item: MicroBatch) -> MicroBatch:
        if self._stream is None:
            return replace(item, batch=item.batch.to(self._device))
        with torch.cuda.stream(self._stream):
            batch = item.batch.to(self._device)
            return replace(item, batch=batch, copied=self._stream.record_event())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self._room.release()
        if error is None:
            self._thread.join()
