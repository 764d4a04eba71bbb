"""Sums, schedules and the engine: what makes a step the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.trainer.jobs import TARGETS, VOCABULARY, make_data, make_model

from tuneward_api.resolved import ResolvedHyperparameters, ResolvedMethod
from tuneward_trainer import patches
from tuneward_trainer.batch import Batch, Sample, collate, total_weight
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.distributed import TreeSum, share, subtrees
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, load_base
from tuneward_trainer.schedule import Schedule, shape


@dataclass
class Text:
    ids: NDArray[np.int32]
    weights: NDArray[np.float16]


def text(length: int, *, seed: int, weights: list[float] | None = None) -> Text:
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, length, dtype=np.int32)
    return Text(ids, np.asarray(weights or [0.0] + [1.0] * (length - 1), np.float16))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_engine(folder: Path, *, dropout: float = 0.0) -> Engine:
    method = ResolvedMethod(
        type="LoRA", rank=4, alpha=8.0, dropout=dropout, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
    )
    model = add_adapters(load_base(folder, torch.device("cpu")), method, seed=1, base_uri="pvc://claim/tiny")
    return Engine(model, weight_decay=0.0, max_grad_norm=1.0)


def gradient_of(engine: Engine, *batches: Batch) -> torch.Tensor:
    with patches.applied(engine.model) as forward:
        for batch in batches:
            engine.forward_backward(forward, batch, cross_entropy)
    gradient = engine.gradient.clone()
    engine.gradient.zero_()
    return gradient


# -- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 13])
def test_any_number_of_ranks_gives_the_same_bytes(leaves: int, world: int) -> None:
    values = torch.randn(leaves, 7, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 4)
    alone = TreeSum(leaves)
    for index in range(leaves):
        alone.add((index, index + 1), values[index].clone())
    finished = TreeSum(leaves)
    for rank in range(world):
        own = TreeSum(leaves)
        for index in share(leaves, rank, world):
            own.add((index, index + 1), values[index].clone())
        assert [span for span, _ in own.parts] == subtrees((0, leaves), share(leaves, rank, world))
        for span, value in own.parts:
            finished.add(span, value)
    assert torch.equal(alone.total(), finished.total())


def test_shares_cover_every_leaf_once() -> None:
    for leaves in range(12):
        assert [leaf for rank in range(5) for leaf in share(leaves, rank, 5)] == list(range(leaves))


# -- the schedule ----------------------------------------------------------------------------------------------------


def hyper(**changes: object) -> ResolvedHyperparameters:
    numbers = {
        "epochs": 4.0, "steps": 12, "learning_rate": 1e-3, "scheduler": "Cosine", "warmup_fraction": 0.25,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "sequence_length": 48, "batch_tokens": 160, "seed": 3,
    }  # fmt: skip
    return ResolvedHyperparameters.model_validate(numbers | changes)


def test_each_document_occurs_once_in_an_epoch(tmp_path: Path) -> None:
    lengths = Documents.open(make_data(tmp_path) / TRAINING).lengths
    schedule = Schedule(lengths, hyper(), bins_per_micro_batch=2)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        seen = [document for step in steps for group in schedule.micro_batches(step) for document in group]
        assert sorted(seen) == list(range(len(lengths)))


def test_the_schedule_depends_on_plan_and_step_alone(tmp_path: Path) -> None:
    lengths = Documents.open(make_data(tmp_path) / TRAINING).lengths
    forwards, backwards = Schedule(lengths, hyper()), Schedule(lengths, hyper())
    expected = [forwards.micro_batches(step) for step in range(12)]
    assert [backwards.micro_batches(step) for step in reversed(range(12))] == expected[::-1]
    assert Schedule(lengths, hyper(seed=4)).micro_batches(0) != expected[0]
    assert len({forwards.seed(step, place) for step in range(9) for place in range(9)}) == 81


@pytest.mark.parametrize(("kind", "end"), [("Cosine", 0.1), ("Linear", 0.1), ("Constant", 1.0)])
def test_the_learning_rate_warms_up_and_ends_where_it_shall(kind: str, end: float) -> None:
    rates = [shape(step, 20, warmup=4, kind=kind) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(end)
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
    assert shape(0, 1, warmup=0, kind=kind) == 1.0


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_ends_each_document_before_its_last_target() -> None:
    batch = collate([(4, text(6, seed=0, weights=[0, 0, 1, 0.5, 0, 0])), (7, text(3, seed=1))])
    assert batch.bounds == (0, 3, 5)
    assert batch.rows.tolist() == [1, 2, 3, 4]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.weights.tolist() == [1, 0.5, 1, 1]
    assert [batch.source_of_row(row) for row in range(4)] == [4, 4, 7, 7]


def test_a_document_without_a_target_is_left_out(model_dir: Path) -> None:
    nothing = collate([(0, text(5, seed=0, weights=[0.0] * 5))])
    assert (nothing.tokens, nothing.documents) == (0, 0)
    engine = make_engine(model_dir)
    assert not gradient_of(engine, nothing).any()


# -- the engine ------------------------------------------------------------------------------------------------------


def test_accumulation_equals_one_large_batch(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    texts = [(index, text(9 + 5 * index, seed=index)) for index in range(4)]
    whole = gradient_of(engine, collate(texts))
    parts = gradient_of(engine, *(collate([item]) for item in texts))
    assert float((whole - parts).norm() / whole.norm()) < 1e-5


def test_tokens_of_weight_zero_get_no_loss_and_the_stop_token_does(model_dir: Path) -> None:
    """A two-turn chat whose first answer has weight 0; 2 is the stop token and also the pad token."""
    engine = make_engine(model_dir)
    ids = np.asarray([1, 10, 11, 20, 2, 12, 13, 21, 2], np.int32)
    weights = np.asarray([0, 0, 0, 0, 0, 0, 0, 1, 1], np.float16)
    batch = collate([(0, Text(ids, weights))])
    assert batch.targets.tolist() == [21, 2]
    with patches.applied(engine.model) as forward:
        found = engine.forward_backward(forward, batch, cross_entropy)
    with torch.no_grad():
        plain = engine.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
    assert float(found.loss) == pytest.approx(-float(plain[6, 21] + plain[7, 2]), rel=1e-5)


def test_a_step_after_load_gives_the_same_bytes(model_dir: Path) -> None:
    batch = collate([(0, text(20, seed=3))])
    first = make_engine(model_dir)
    for _ in range(2):
        first.optim_step(1e-2, gradient_of(first, batch))
    second = make_engine(model_dir)
    second.load(first.save(), first.step)
    for engine in (first, second):
        engine.optim_step(1e-2, gradient_of(engine, batch))
    assert second.step == 3
    assert all(torch.equal(value, second.save()[name]) for name, value in first.save().items())


def test_gradients_are_clipped_to_the_norm(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    engine.max_grad_norm = 0.5
    gradient = torch.zeros_like(engine.gradient)
    gradient[:4] = 3.0
    assert float(engine.optim_step(0.0, gradient)) == pytest.approx(6.0)
    moments = engine.save()
    largest = max(float(moments[name].abs().max()) for name in moments if name.startswith("exp_avg."))
    assert largest == pytest.approx(0.1 * 3.0 * 0.5 / 6.0, rel=1e-4)


def test_dropout_depends_on_its_seed_alone(model_dir: Path) -> None:
    engine = make_engine(model_dir, dropout=0.5)
    engine.optim_step(1e-2, torch.randn_like(engine.gradient))
    batch = collate([(0, text(20, seed=3))])
    losses = []
    for seed in (5, 6, 5):
        with patches.applied(engine.model) as forward:
            losses.append(float(engine.forward_backward(forward, batch, cross_entropy, seed=seed).loss))
    assert losses[0] == losses[2] != losses[1]


@dataclass
class Seen:
    """A loss that is no cross entropy: the engine needs only that it is a function of log-probabilities."""

    logprobs: list[torch.Tensor] = field(default_factory=list)
    figures: tuple[str, ...] = ("loss", "probability")

    def total(self, samples: Iterable[Sample]) -> float:
        return total_weight(samples)

    def __call__(self, logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.logprobs.append(logprobs.detach())
        probabilities = logprobs.exp() * batch.weights
        return torch.stack([probabilities.square().sum(), probabilities.sum()])


def test_any_loss_of_logprobs_gets_its_exact_gradient(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    engine.optim_step(1e-2, torch.randn_like(engine.gradient))
    batch = collate([(0, text(12, seed=3)), (1, text(17, seed=4))])
    found = []
    for names in (patches.ALL, (patches.PACKED_ATTENTION,)):
        with patches.applied(engine.model, names) as forward:
            output = engine.forward_backward(forward, batch, Seen())
        assert output.figures.shape == (2,)
        found.append(engine.gradient.clone())
        engine.gradient.zero_()
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4
