"""`evaluation.patience`: which state had the lowest validation loss, and whether waiting for a lower one is over.

A function of the losses alone, which are the same on every rank and after every kill; checkpoints carry it in their notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass
class Best:
    """`patience`: evaluations without a lower loss that are waited for; None: there is no best, the last state counts."""

    patience: int | None
    step: int | None = None
    loss: float = math.inf
    waited: int = 0

    @classmethod
    def resumed(cls, patience: int | None, notes: Mapping[str, float]) -> Self:
        """As it was when a checkpoint with these notes was written."""
        if patience is None or "best_step" not in notes:
            return cls(patience)
        return cls(patience, int(notes["best_step"]), notes["best_loss"], int(notes["best_waited"]))

    def notes(self) -> dict[str, float]:
        return {} if self.step is None else {"best_step": self.step, "best_loss": self.loss, "best_waited": self.waited}

    def see(self, step: int, loss: float) -> bool:
        """Takes the loss after `step`; whether it is the lowest so far."""
        if loss < self.loss:
            self.step, self.loss, self.waited = step, loss, 0
            return True
        self.waited += 1
        return False

    @property
    def spent(self) -> bool:
        return self.patience is not None and self.waited >= self.patience
