"""What happens at a step: which documents, which learning rate, which seed. Pure functions of the plan and the step.

So nothing of it is saved in a checkpoint, and a resumed job or one on more workers computes the same again.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.objective import ObjectiveType
from tuneward_api.resolved import ResolvedHyperparameters
from tuneward_trainer import packing

FLOOR: Final = 0.1
"""Share of the peak learning rate that Cosine and Linear end at."""


def documents_a_unit(objective: ObjectiveType) -> int:
    """Documents that are never apart: the two of a pair, which lie side by side in the data."""
    return 2 if objective == "DPO" else 1


def units(lengths: NDArray[np.int32], documents: int) -> NDArray[np.int32]:
    """Tokens of each unit: int32 [documents of the data / `documents` of a unit]."""
    found: NDArray[np.int32] = lengths.reshape(-1, documents).sum(1, dtype=np.int32)
    return found


@dataclass(frozen=True, eq=False)
class Schedule:
    """`lengths` int32 [documents]; a micro-batch holds the documents of `bins_per_micro_batch` bins, and a bin has room
    for `unit` documents of the greatest length."""

    lengths: NDArray[np.int32]
    hyper: ResolvedHyperparameters
    bins_per_micro_batch: int = 1
    unit: int = 1

    @functools.cached_property
    def _units(self) -> NDArray[np.int32]:
        return units(self.lengths, self.unit)

    @property
    def row_tokens(self) -> int:
        """Tokens of a bin at most."""
        return self.hyper.sequence_length * self.unit

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return packing.steps_per_epoch(self._units, sequence_length=self.row_tokens, batch_tokens=self.hyper.batch_tokens)

    def epoch(self, step: int) -> float:
        """Passes over the data when `step` steps are done."""
        return step / self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """The documents of each micro-batch of step `step` (from 0). Their order is that of the gradient's tree, and
        they do not depend on whether rows are packed or on the number of ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        bins = self._epoch(epoch)[place]
        size = self.bins_per_micro_batch
        groups = [bins[start : start + size] for start in range(0, len(bins), size)]
        return [
            [self.unit * index + part for row in group for index in row for part in range(self.unit)] for group in groups
        ]

    def learning_rate(self, step: int) -> float:
        """Of step `step` (from 0) of `hyper.steps`."""
        return self.hyper.learning_rate * shape(
            step, self.hyper.steps, warmup=round(self.hyper.warmup_fraction * self.hyper.steps), kind=self.hyper.scheduler
        )

    def seed(self, step: int, micro_batch: int) -> int:
        """For the dropout of one micro-batch, wherever it is computed."""
        text = f"{self.hyper.seed}/{step}/{micro_batch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    # One epoch is all that is ever needed at a time; 2 so that an epoch's end does not compute it twice.
    @functools.lru_cache(maxsize=2)  # noqa: B019 - a schedule lives as long as its process
    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        packed = packing.bins(self._units, seed=self.hyper.seed, epoch=epoch, sequence_length=self.row_tokens)
        return packing.steps(packed, self._units, count=self.steps_per_epoch)


def shape(step: int, steps: int, *, warmup: int, kind: str) -> float:
    """Share of the peak learning rate: rises to 1 at step `warmup` - 1, then falls to FLOOR at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "Constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "Cosine" else 1 - progress
    return FLOOR + (1 - FLOOR) * fall
