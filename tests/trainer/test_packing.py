"""Packing is a pure function: every document once, no row too long, the same order for the same arguments."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tuneward_trainer import packing


def lengths(count: int, longest: int, seed: int = 1) -> np.ndarray:
    dice = random.Random(seed)
    return np.array([dice.randint(2, longest) for _ in range(count)], np.int32)


@pytest.mark.parametrize(("count", "longest"), [(0, 8), (1, 8), (7, 64), (500, 64), (10_000, 40)])
def test_every_document_occurs_once_and_no_bin_overflows(count: int, longest: int) -> None:
    sizes = lengths(count, longest)
    found = packing.bins(sizes, seed=3, epoch=0, sequence_length=64)
    assert sorted(document for packed in found for document in packed) == list(range(count))
    assert all(sum(sizes[document] for document in packed) <= 64 for packed in found)
    if count > 1000:
        assert sizes.sum() / (64 * len(found)) > 0.97


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sizes = lengths(50, 30)
    orders = [packing.bins(sizes, seed=seed, epoch=epoch, sequence_length=64) for seed in (0, 1) for epoch in (0, 1)]
    assert orders[0] == packing.bins(sizes, seed=0, epoch=0, sequence_length=64)
    assert len({str(order) for order in orders}) == 4


def test_the_order_of_today_is_the_order_of_every_version() -> None:
    """A resumed job must find its order again: changing these values breaks every running job."""
    assert packing.permutation(8, 0, 0, 0) == [1, 0, 4, 6, 7, 2, 3, 5]
    assert packing.bins(np.array([5, 3, 9, 2, 2, 7], np.int32), seed=7, epoch=2, sequence_length=10) == [
        [5, 1],
        [0, 4, 3],
        [2],
    ]


def test_a_document_that_fits_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a document of 65 tokens does not fit a row of 64"):
        packing.bins(np.array([65], np.int32), seed=0, epoch=0, sequence_length=64)


@pytest.mark.parametrize(
    ("sizes", "sequence_length", "batch_tokens", "expected"),
    [
        ([10], 64, 4096, 1),
        ([10] * 100, 64, 250, 4),
        ([10] * 100, 64, 400, 3),
        ([60] * 10, 64, 16, 10),
        ([64] * 10, 64, 64, 10),
    ],
)
def test_steps_of_an_epoch(sizes: list[int], sequence_length: int, batch_tokens: int, expected: int) -> None:
    array = np.array(sizes, np.int32)
    assert packing.steps_per_epoch(array, sequence_length=sequence_length, batch_tokens=batch_tokens) == expected


@pytest.mark.parametrize("batch_tokens", [16, 64, 100, 777, 4096, 10**6])
def test_steps_hold_every_bin_in_order_and_none_is_empty(batch_tokens: int) -> None:
    sizes = lengths(300, 64, seed=batch_tokens)
    count = packing.steps_per_epoch(sizes, sequence_length=64, batch_tokens=batch_tokens)
    found = packing.bins(sizes, seed=0, epoch=0, sequence_length=64)
    cut = packing.steps(found, sizes, count=count)
    assert [packed for step in cut for packed in step] == found
    assert len(cut) == count
    assert all(cut)
    tokens = [sum(sizes[document] for packed in step for document in packed) for step in cut]
    assert max(tokens) <= sum(tokens) / count + 2 * 64
