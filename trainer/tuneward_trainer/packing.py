"""Which documents share a row, and which rows make an optimizer step: a pure function of its arguments.

Nothing about the order is ever saved: a resumed job, and a job on another number of workers, computes the same order
again. So this file uses integer arithmetic of its own (splitmix64) instead of a library's generator, whose stream may
change with its version.

Words: a *bin* is a list of documents that share one packed row (at most `sequence_length` tokens); a *step* is a list
of bins (about `batch_tokens` tokens). All lists hold indices into `lengths`. Where documents must stay together, as the two
of a pair, each entry of `lengths` stands for all of them (schedule.units).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import accumulate
from typing import Final

import numpy as np
from numpy.typing import NDArray

WINDOW: Final = 4096
"""Documents that are packed together. More would fill rows a little better and cost more time per document."""


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea, Flood 2014) on each entry: the same bits on every machine."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(count: int, *key: int) -> list[int]:
    """0 … count-1 in an order that depends on `key` alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state + np.uint64(0x9E3779B97F4A7C15) + np.asarray([part], np.uint64))
    ranks = mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    order: list[int] = np.argsort(ranks, kind="stable").tolist()
    return order


def bins(lengths: NDArray[np.int32], *, seed: int, epoch: int, sequence_length: int) -> list[list[int]]:
    """The epoch's packed rows. Each document occurs exactly once; documents are shuffled, then packed window by window
    (best fit, longest first), and the rows are shuffled again so that no step holds only long or only short ones.

    Raises ValueError for a document longer than `sequence_length`: prepare lets none pass.
    """
    if len(lengths) and int(lengths.max()) > sequence_length:
        raise ValueError(f"a document of {int(lengths.max())} tokens does not fit a row of {sequence_length}")
    sizes: list[int] = lengths.tolist()
    order = permutation(len(sizes), seed, epoch, 0)
    packed: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        packed += _best_fit(order[start : start + WINDOW], sizes, sequence_length)
    return [packed[index] for index in permutation(len(packed), seed, epoch, 1)]


def _best_fit(window: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that still takes it."""
    packed: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for document in sorted(window, key=lambda index: -sizes[index]):
        size = sizes[document]
        place = bisect_left(free, (size, -1))
        if place == len(free):
            packed.append([])
            left, target = capacity, len(packed) - 1
        else:
            left, target = free.pop(place)
        packed[target].append(document)
        insort(free, (left - size, target))
    return packed


def steps_per_epoch(lengths: NDArray[np.int32], *, sequence_length: int, batch_tokens: int) -> int:
    """Optimizer steps of one epoch: the same for every epoch and every packing, and at least one.

    Documents are at most `sequence_length` long, so there are at least tokens/sequence_length bins: no step is empty.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    wanted = (2 * tokens + batch_tokens) // (2 * batch_tokens)  # rounded
    return max(1, min(wanted, -(-tokens // sequence_length)))


def steps(epoch_bins: list[list[int]], lengths: NDArray[np.int32], *, count: int) -> list[list[list[int]]]:
    """Cuts an epoch's bins into `count` steps of nearly equal tokens: no small last step with a loud gradient.

    Needs at least `count` bins; each step gets at least one.
    """
    sizes: list[int] = lengths.tolist()
    ends = list(accumulate(sum(sizes[document] for document in packed) for packed in epoch_bins))
    cut = []
    start = 0
    for step in range(count):
        target = ends[-1] * (step + 1) // count
        # Ends where the tokens so far are nearest to the target, leaving a bin for each later step.
        end = min(max(bisect_left(ends, target, start), start), len(ends) - 1)
        nearer = end > start and target - ends[end - 1] < ends[end] - target
        stop = min(end + (0 if nearer else 1), len(epoch_bins) - (count - step - 1))
        cut.append(epoch_bins[start:stop])
        start = stop
    return cut
