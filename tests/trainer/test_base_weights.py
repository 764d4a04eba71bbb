"""Whether ranks share the frozen base model: what prepare chooses, what ranks on GPUs choose, and what is said where memory ran
out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.trainer.rooms import Room
from tests.trainer.test_memory import MISTRAL_7B, costs

from tuneward_api.estimate import GIB
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_trainer.memory import Choice, Costs, _shared, base_weights

LLAMA_70B = MISTRAL_7B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128_256}


def job(method: str | None = None, **workers: Any) -> FineTuneJobSpec:
    spec: dict[str, Any] = {"model": {"uri": "pvc://models/x"}, "datasets": {"training": [{"uri": "pvc://data/x.jsonl"}]}}
    return FineTuneJobSpec.model_validate(spec | {"workers": workers, "method": {"type": method}})


def on(ranks: int, config: dict[str, Any] = LLAMA_70B, **setup: Any) -> Costs:
    one = costs(config)
    return replace(one, ranks=ranks, setup=replace(one.setup, **setup))


@pytest.mark.parametrize(
    ("spec", "ranks", "room", "chosen"),
    [
        (job(), 1, None, "Replicated"),
        # Only the ranks know their GPUs.
        (job(gpusPerWorker=8), 8, None, "Auto"),
        (job(gpusPerWorker=8, baseWeights="Sharded"), 8, None, "Sharded"),
        (job(gpusPerWorker=8, baseWeights="Replicated"), 8, 24 * GIB, "Replicated"),
        (job(gpusPerWorker=0, replicas=8), 8, 400 * GIB, "Sharded"),
        (job(gpusPerWorker=0, replicas=8), 8, 640 * GIB, "Replicated"),
        # Not even a share fits: nothing is won.
        (job(gpusPerWorker=0, replicas=8), 8, 200 * GIB, "Replicated"),
        (job("Full", gpusPerWorker=8), 8, None, None),
    ],
)
def test_the_job_is_asked_first_and_then_the_memory(
    spec: FineTuneJobSpec, ranks: int, room: int | None, chosen: str | None
) -> None:
    assert base_weights(spec, on(ranks, device="cuda" if room is None else "cpu"), room) == chosen


@pytest.mark.parametrize(
    ("found", "gib", "shards"),
    [
        # 70 billion parameters in bf16 are 131 GiB.
        (on(8), 80, 8),
        (on(8), 192, 1),
        (on(1), 80, 1),
        (on(8), 12, 1),
        # 7 billion fit where layers are computed twice.
        (on(8, MISTRAL_7B), 24, 1),
        (on(8, MISTRAL_7B), 12, 8),
        # What packs weights holds them all at first: 37 GiB.
        (on(8, nf4=True), 40, 8),
        (on(8, nf4=True), 34, 1),
    ],
)
def test_ranks_on_gpus_choose_by_the_smallest(found: Costs, gib: int, shards: int) -> None:
    assert found.placed("Auto", gib * GIB).setup.shards == shards
    assert found.placed("Replicated", gib * GIB).setup.shards == found.placed("Auto", None).setup.shards == 1
    assert found.placed("Sharded", None).setup.shards == found.ranks


def test_out_of_memory_names_it_where_it_would_help() -> None:
    tried = Choice(1, recompute=True)
    assert _shared(on(8), tried, 80 * GIB) == "set spec.workers.baseWeights to Sharded (about 46.5 GiB each), "
    assert (
        _shared(on(1), tried, 80 * GIB)
        == "raise spec.workers.replicas so that 8 ranks share the base model (about 46.5 GiB each), "
    )
    assert _shared(on(8).sharded, tried, 80 * GIB).startswith("raise spec.workers.replicas so that 32 ranks")
    assert _shared(on(8), tried, 24 * GIB) == ""


def test_prepare_shards_what_a_worker_cannot_hold(room: Room, unverified: None) -> None:
    workers = {"gpusPerWorker": 0, "replicas": 4, "resources": {"limits": {"memory": "1500Mi"}}}
    room.request["spec"] |= {"workers": workers, "method": {"rank": 4}}
    code, report = room.run()
    assert code == 0, report
    assert report["prepared"]["baseWeights"] == "Sharded"
    assert report["message"].endswith("trains 1221120 of 134515008 parameters, sharded over the ranks")
    # A quarter of the weights; and whole, for a pass, the embeddings.
    assert report["prepared"]["estimate"]["weightBytes"] == 134515008
