"""Samples that occur more than once, and validation samples that are trained on: by the digests of ids and masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data.documents import Documents, Place


@dataclass(frozen=True)
class Overlap:
    """`pairs` is intp [samples, 2]: a document of `samples`, and the first equal one of `others`."""

    samples: Documents
    others: Documents
    pairs: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.pairs)

    def places(self, limit: int) -> Iterator[tuple[Place, Place]]:
        """(where it stands, where the same stands) of the first ones."""
        for sample, other in islice(self.pairs.tolist(), limit):
            yield self.samples.place(sample), self.others.place(other)


def duplicates(documents: Documents) -> Overlap:
    """Samples that another one before them is equal to."""
    firsts = documents.samples()
    _, first, inverse = np.unique(documents.digests[firsts], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(firsts)))
    return Overlap(documents, documents, np.stack([firsts[repeated], firsts[first[inverse[repeated]]]], axis=1))


def leaks(training: Documents, validation: Documents) -> Overlap:
    """Validation samples that are training samples too: the loss on them says nothing of new samples."""
    asked, trained = validation.samples(), training.samples()
    known, first = np.unique(training.digests[trained], return_index=True)
    digests = validation.digests[asked]
    found = np.minimum(np.searchsorted(known, digests), max(0, len(known) - 1))
    leaked = np.flatnonzero(known[found] == digests) if len(known) else np.empty(0, np.intp)
    return Overlap(validation, training, np.stack([asked[leaked], trained[first[found[leaked]]]], axis=1))
