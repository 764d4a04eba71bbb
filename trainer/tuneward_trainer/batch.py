"""A micro-batch: some documents one after the other, and the rows that have a target.

The last useful input of a document is the one before its last target: what comes after it can change no logit that
counts (attention is causal), so it is cut off here and never computed.

Names end in their shape: T tokens of all documents, R rows with a target, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Sample(Protocol):
    """What a document must have; `weights[i]` is the loss weight of predicting ids[i], and weights[0] is 0."""

    @property
    def ids(self) -> NDArray[np.int32]: ...

    @property
    def weights(self) -> NDArray[np.float16]: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Model inputs and, for each row, loss inputs."""

    ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T]; begins at 0 in each document."""
    bounds: tuple[int, ...]
    """[D + 1]; document d is ids[bounds[d] : bounds[d + 1]]."""
    cu: Tensor
    """int32 [D + 1]; the same on the device, as attention kernels want it."""
    longest: int
    """Upper bound of a document's length; a constant, so that a compiled layer is compiled once."""
    rows: Tensor
    """int64 [R], ascending; the position in T whose next token is a target."""
    row_bounds: tuple[int, ...]
    """[D + 1]; rows of document d are rows[row_bounds[d] : row_bounds[d + 1]]."""
    targets: Tensor
    """int64 [R]."""
    weights: Tensor
    """float32 [R]."""
    sources: tuple[int, ...]
    """[D]; the documents' indices in the data, to name them in an error."""

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def documents(self) -> int:
        return len(self.sources)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a device needs of it, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Batch:
        """Copies to `device`."""
        if device.type == "cpu":
            return self
        copies: dict[str, Any] = {name: moved(tensor, device) for name, tensor in self.tensors.items()}
        return replace(self, **copies)

    def scaled(self, factor: float) -> Batch:
        """The same with all weights multiplied by `factor`."""
        return replace(self, weights=self.weights * factor)

    def source_of_row(self, row: int) -> int:
        """Index in the data of the document that row `row` of R belongs to."""
        document = next(d for d in range(self.documents) if row < self.row_bounds[d + 1])
        return self.sources[document]


def padded(batch: Batch, tokens: int) -> Batch:
    """The same with further documents up to `tokens` tokens, of which no row has a target and nobody speaks. Attention keeps
    them apart, so they change nothing. Raises ValueError where there are more tokens already."""
    spare = tokens - batch.tokens
    if spare < 0 or not batch.longest:
        raise ValueError(f"a row of {batch.tokens} tokens is to be {tokens} long")
    pieces = [min(batch.longest, spare - start) for start in range(0, spare, batch.longest)]
    ends = torch.tensor([batch.tokens, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)[1:]
    return replace(
        batch,
        ids=torch.cat([batch.ids, batch.ids.new_zeros(spare)]),
        positions=torch.cat([batch.positions, *(torch.arange(piece) for piece in pieces)]),
        cu=torch.cat([batch.cu, ends]),
    )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on `device`; from pinned memory, so that the host does not wait for what the GPU has to do before."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collate(samples: Iterable[tuple[int, Sample]], *, longest: int | None = None) -> Batch:
    """Documents without a target are left out: they would cost time and teach nothing."""
    kept = [(index, ids, rows, weights) for index, sample in samples for ids, rows, weights in [_cut(sample)] if len(rows)]
    bounds = tuple(accumulate((int(rows[-1]) + 1 for _, _, rows, _ in kept), initial=0))
    row_bounds = tuple(accumulate((len(rows) for _, _, rows, _ in kept), initial=0))
    return Batch(
        ids=_join([ids[: rows[-1] + 1] for _, ids, rows, _ in kept], np.int64),
        positions=_join([np.arange(rows[-1] + 1) for _, _, rows, _ in kept], np.int64),
        bounds=bounds,
        cu=torch.tensor(bounds, dtype=torch.int32),
        longest=longest or max((stop - start for start, stop in pairwise(bounds)), default=0),
        rows=_join([rows + start for (_, _, rows, _), start in zip(kept, bounds, strict=False)], np.int64),
        row_bounds=row_bounds,
        targets=_join([ids[rows + 1] for _, ids, rows, _ in kept], np.int64),
        weights=_join([weights for _, _, _, weights in kept], np.float32),
        sources=tuple(index for index, _, _, _ in kept),
    )


def _cut(sample: Sample) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]:
    """(ids, rows, weights of the rows): row i predicts ids[i + 1]."""
    weights = np.asarray(sample.weights, np.float32)
    rows = np.flatnonzero(weights[1:])
    return sample.ids, rows, weights[1:][rows]


def _join(parts: list[NDArray[np.int32]] | list[NDArray[np.int64]] | list[NDArray[np.float32]], dtype: type) -> Tensor:
    joined = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(joined.astype(dtype))


def total_weight(samples: Iterable[Sample]) -> float:
    """Sum of the loss weights, in double precision."""
    return float(sum(float(sample.weights.sum(dtype=np.float64)) for sample in samples))
