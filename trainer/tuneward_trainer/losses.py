"""Losses are functions of the targets' log-probabilities, whatever made these.

So the same engine serves supervised training, preferences, and policy losses later: they need more inputs a row or a
document (reference or old log-probabilities, advantages), not another forward pass. The gradient of any of them is the sum
over rows of d loss / d logprob times d logprob / d theta, and the loss head has the latter already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuneward_trainer.batch import Batch, Sample, moved, total_weight


class Loss(Protocol):
    """What is minimised, and what else is worth a look."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what a call returns: the loss, which alone is trained, and further sums without a gradient."""
        ...

    def __call__(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """`logprobs` [R] of `batch.targets` -> [len(figures)] sums over the batch, weighted by `batch.weights`."""
        ...

    def total(self, samples: Iterable[Sample]) -> float:
        """What sums over `samples` are divided by to be means."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Weighted negative log-likelihood in nats; its mean is over the targets' weights."""

    figures: tuple[str, ...] = ("loss",)

    def __call__(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return -(logprobs * batch.weights).sum()[None]

    def total(self, samples: Iterable[Sample]) -> float:
        return total_weight(samples)


cross_entropy = CrossEntropy()


@dataclass(frozen=True, eq=False)
class Preference:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), its mean over pairs:

        -log sigmoid(beta (log p(chosen) - log p_ref(chosen) - log p(rejected) + log p_ref(rejected)))

    `reference` float64 [documents of the data]: each document's log p_ref, summed over its targets. Documents 2i and
    2i + 1 are the chosen and the rejected answer of pair i; a batch holds whole pairs, whose rows all have one weight.
    Sums over tokens are float64: a margin is a small difference of large numbers.
    """

    beta: float
    reference: Tensor
    figures: tuple[str, ...] = ("loss", "reward_margin", "reward_accuracy")

    def __call__(self, logprobs: Tensor, batch: Batch) -> Tensor:
        if not batch.documents:
            return logprobs.new_zeros(len(self.figures))
        gained = sums(logprobs, batch) - moved(self.reference[list(batch.sources)], logprobs.device)
        margins = self.beta * (gained[0::2] - gained[1::2])
        weights = batch.weights[moved(torch.tensor(batch.row_bounds[:-1:2]), batch.weights.device)]
        with torch.no_grad():
            seen = torch.stack([margins, (margins > 0).double()])
        values = torch.stack([-logsigmoid(margins), *seen])
        return (values * weights).sum(1).to(logprobs.dtype)

    def total(self, samples: Iterable[Sample]) -> float:
        return sum(1 for _ in samples) / 2


def sums(logprobs: Tensor, batch: Batch) -> Tensor:
    """[R] -> float64 [D], over each document's targets."""
    return torch.stack([logprobs[start:stop].double().sum() for start, stop in pairwise(batch.row_bounds)])
