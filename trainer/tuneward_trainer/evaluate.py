"""Figures on held-out documents, and documents' log-probabilities: the same numbers on any number of ranks.

Rows are a function of the documents alone, one rank scores a row, and what a rank did not score it adds as zeros: so every
sum over ranks is exact. Where ranks hold one model together, one that has no row left scores another's for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from tuneward_trainer import losses
from tuneward_trainer.batch import Batch, collate
from tuneward_trainer.data.documents import Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.losses import CrossEntropy, Loss
from tuneward_trainer.patches import Forward, Patched


class StoppedError(Exception):
    """A rank was asked to stop on the way: there is no figure."""


ROUND: Final = 8
"""Rows that a rank scores between two looks at whether to stop."""


def filler(documents: Documents, unit: int = 1) -> Batch:
    """`unit` documents that belong together, of weight 0: what a rank passes through the model for the others' sake. Raises
    ValueError where no document has a target."""
    for first in range(0, len(documents), unit):
        batch = collate((index, documents[index]) for index in range(first, first + unit))
        if batch.documents == unit:
            return batch.scaled(0.0)
    raise ValueError("no document has a target")


def rows_of(lengths: Sequence[int], tokens: int, unit: int = 1) -> list[list[int]]:
    """Documents in their own order, so many in a row as fit `tokens`; `unit` of them are never apart."""
    rows: list[list[int]] = []
    used = tokens
    for first in range(0, len(lengths), unit):
        length = sum(lengths[first : first + unit])
        if used + length > tokens:
            rows.append([])
            used = 0
        rows[-1] += range(first, first + unit)
        used += length
    return rows


def figures(
    forward: Patched, documents: Documents, loss: Loss, gang: Gang, *, rows: list[list[int]], stopping: Callable[[], bool]
) -> dict[str, float] | None:
    """Means of the loss's figures over all documents, by name; of a cross entropy also `accuracy`, the share of the targets'
    weight where the target is what the model would write. None if there is nothing to score. Raises StoppedError on every
    rank where `stopping()` became true on any."""

    def score(row: list[int]) -> Tensor:
        batch, (logprobs, right) = _scored(forward.judged, documents, row, gang, 2)
        total = loss.total(documents[index] for index in row)
        counted = torch.tensor([float((right * batch.weights).sum()), total], dtype=torch.float64)
        return torch.cat([loss(logprobs, batch), counted])

    found = _every_row(score, rows, len(loss.figures) + 2, gang, stopping)
    *sums, right, total = found.sum(0).tolist()
    if not total:
        return None
    accuracy = {"accuracy": right / total} if isinstance(loss, CrossEntropy) else {}
    return {name: value / total for name, value in zip(loss.figures, sums, strict=True)} | accuracy


def logprobs(
    forward: Forward, documents: Documents, indices: Sequence[int], gang: Gang, *, tokens: int, stopping: Callable[[], bool]
) -> Tensor:
    """float64 [len(indices)]: log-probability of each document's targets. Raises StoppedError as `figures` does."""
    lengths = [int(documents.lengths[index]) for index in indices]
    places = rows_of(lengths, tokens)
    width = max(map(len, places), default=0)

    def score(row: list[int]) -> Tensor:
        batch, found = _scored(forward, documents, [indices[place] for place in row], gang)
        return torch.nn.functional.pad(losses.sums(found, batch), (0, width - len(row)))

    found = _every_row(score, places, width, gang, stopping)
    return torch.cat([values[: len(row)] for values, row in zip(found, places, strict=True)]) if places else found.flatten()


@torch.no_grad()
def _every_row(
    score: Callable[[list[int]], Tensor], rows: list[list[int]], width: int, gang: Gang, stopping: Callable[[], bool]
) -> Tensor:
    """float64 [rows, width], on every rank."""
    found = torch.zeros(len(rows), width, dtype=torch.float64)
    for start in range(0, len(rows), ROUND * gang.world):
        stop = min(start + ROUND * gang.world, len(rows))
        for first in range(start, stop, gang.world):
            index = first + gang.rank
            if index < stop:
                found[index] = score(rows[index])
            elif gang.model_sharded:
                score(rows[first])
        heed(gang, stopping)
    return gang.add(found)


def heed(gang: Gang, stopping: Callable[[], bool]) -> None:
    """Raises StoppedError on every rank where any was asked to stop."""
    if gang.add(torch.tensor([float(stopping())]))[0]:
        raise StoppedError


def _scored(forward: Forward, documents: Documents, row: list[int], gang: Gang, *kinds: int) -> tuple[Batch, Tensor]:
    """The row's batch, and [*kinds, R] of its targets, in float64 on the CPU."""
    batch = collate((index, documents[index]) for index in row)
    scored = torch.zeros(*kinds, 0, dtype=torch.float64)
    if batch.documents:
        scored = forward(batch.to(gang.device)).double().cpu()
    elif gang.model_sharded:
        forward(filler(documents).to(gang.device))
    return replace(batch, weights=batch.weights.double()), scored
