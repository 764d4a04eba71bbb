"""Losses are functions of the targets' log-probabilities, whatever made these.

So the same engine serves supervised training today and preference or policy losses later: they need more inputs a row
(advantages, old log-probabilities), not another forward pass.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tuneward_trainer.batch import Batch


class Loss(Protocol):
    """`logprobs` float32 [R] of `batch.targets` -> a scalar to minimise."""

    def __call__(self, logprobs: Tensor, batch: Batch) -> Tensor: ...


def cross_entropy(logprobs: Tensor, batch: Batch) -> Tensor:
    """Weighted negative log-likelihood, summed, in nats. Weights already hold 1 / total weight of the optimizer step,
    so sums over micro-batches and ranks are the mean over the step's tokens."""
    return -(logprobs * batch.weights).sum()
