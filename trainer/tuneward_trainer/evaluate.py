"""Loss on held-out documents: nats a target token, the same number on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from tuneward_trainer.batch import collate
from tuneward_trainer.data.documents import Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.patches import Forward

ROUND: Final = 8
"""Rows that a rank scores between two looks at whether to stop."""


def rows_of(documents: Documents, tokens: int) -> list[list[int]]:
    """Documents in their own order, so many in a row as fit `tokens`."""
    rows: list[list[int]] = []
    used = tokens
    for index, length in enumerate(documents.lengths.tolist()):
        if used + length > tokens:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows


@torch.no_grad()
def loss(forward: Forward, documents: Documents, gang: Gang, *, tokens: int, stopping: Callable[[], bool]) -> float | None:
    """None if there is nothing to score, or if `stopping()` became true on any rank on the way."""
    rows = rows_of(documents, tokens)
    # [row, (sum of weighted -log p, sum of weights)]: one rank fills an entry, so the sum over ranks is exact.
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    for start in range(0, len(rows), ROUND * gang.world):
        for index in range(start + gang.rank, min(start + ROUND * gang.world, len(rows)), gang.world):
            sums[index] = _score(forward, documents, rows[index], gang.device)
        if gang.add(torch.tensor([float(stopping())]))[0]:
            return None
    nll, weight = gang.add(sums).sum(0).tolist()
    return nll / weight if weight else None


def _score(forward: Forward, documents: Documents, row: list[int], device: torch.device) -> torch.Tensor:
    batch = collate((index, documents[index]) for index in row)
    if not len(batch.rows):
        return torch.zeros(2, dtype=torch.float64)
    logprobs = forward(batch.to(device)).double().cpu()
    weights = batch.weights.double()
    return torch.stack([-(logprobs * weights).sum(), weights.sum()])
