"""Preferences of all weights: the reference is the state at step 0, scored once; TRL holds a second model for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.jobs import PREFERENCE, Gang, Job, make_job, step_lines, train
from tests.trainer.test_full import FULL, PACKED, losses, weights
from tests.trainer.test_preference import ALONE, BETA, relative, trl_trainer
from tests.trainer.test_preference_job import references
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from tuneward_api import manifest
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import defaults, evaluate, patches, rundir
from tuneward_trainer.batch import collate
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.losses import Preference
from tuneward_trainer.model import load_whole, trainable
from tuneward_trainer.sharded import ShardedEngine, shard

HYPER = {"steps": 8, "learning_rate": 1e-3, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank."""
    store = tmp_path_factory.mktemp("store")
    return train(make_job(store, method=FULL, packing=PACKED, objective=PREFERENCE, hyper=HYPER))


@pytest.fixture(scope="module")
def pair(alone: Job) -> Job:
    """The same by two."""
    return train(alone.again("pair"), 2)


def metrics(job: Job) -> list[dict[str, Any]]:
    newest = rundir.attempt_directory(job.run, rundir.attempt_numbers(job.run)[-1])
    return [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trl(alone: Job, tmp_path: Path) -> None:
    """Of every weight, its second model against our scores."""
    base = alone.store / "models/tiny"
    pairs = Documents.open(alone.store / "data/tiny" / TRAINING)
    batch = collate((index, pairs[index]) for index in range(8))
    model = shard(load_whole(base, ALONE.device), ALONE)
    engine = ShardedEngine(model, ALONE, weight_decay=0.0, max_grad_norm=1.0, idle=evaluate.filler(pairs, 2))
    trainer = trl_trainer(pairs, LlamaForCausalLM.from_pretrained(base), tmp_path)
    theirs = dict(trainer.model.named_parameters())
    with patches.applied(model, patches.OF_WHOLE_MODELS) as forward:
        start = evaluate.logprobs(forward, pairs, range(len(pairs)), ALONE, tokens=64, stopping=lambda: False)
        assert float(Preference(BETA, start)(forward(batch), batch)[0]) == pytest.approx(4 * math.log(2), rel=1e-5)
        engine.refresh()
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(trainable(model).items()):
                moved = torch.randn(theirs[name].shape, generator=torch.Generator().manual_seed(seed)) * 0.02
                assert isinstance(parameter, DTensor)
                parameter.to_local().add_(moved)
                theirs[name].add_(moved)
        found = engine.forward_backward(forward, batch.scaled(1 / 4), Preference(BETA, start))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    torch.autograd.backward(loss)
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5) != pytest.approx(math.log(2), rel=1e-3)
    for name, parameter in trainable(model).items():
        assert isinstance(parameter.grad, DTensor)
        assert relative(parameter.grad.to_local(), theirs[name].grad) < 1e-4, name


def test_it_begins_at_the_reference_and_learns_to_prefer(alone: Job) -> None:
    lines = metrics(alone)
    steps = [line for line in lines if "train_loss" in line]
    held_out = [line for line in lines if "validation_loss" in line]
    for first in (steps[0]["train_loss"], held_out[0]["validation_loss"]):
        assert first == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["train_loss"] < 0.6
    assert steps[-1]["reward_accuracy"] == 1


def test_two_ranks_have_the_same_reference_and_train_as_one_does(alone: Job, pair: Job) -> None:
    """Untouched weights are the same on both; gradients are added up in another order."""
    assert references(pair) == references(alone)
    assert len(references(pair)) == 2
    assert losses(pair) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("moment", ["reference", "step"])
def test_killed_and_resumed_it_is_the_same_to_the_byte(pair: Job, moment: str) -> None:
    job = pair.again(f"killed-{moment}")
    gang = Gang(job, 2)
    if moment == "reference":
        # Not before: a rank that is gone while groups are made is noticed by its launcher alone, which there is none of here.
        gang.until(lambda: phase(job) not in ("", "Starting", "Loading"))
    else:
        gang.until(lambda: any(map(manifest.complete, (job.run / "checkpoints").glob("*"))))
    gang.processes[1].kill()
    gang.wait()
    train(job, 2)
    assert references(job) == references(pair)
    assert weights(job).keys() == weights(pair).keys()
    assert all(torch.equal(tensor, weights(pair)[name]) for name, tensor in weights(job).items())
    assert moment == "reference" or job.results()[0].from_step > 0


def phase(job: Job) -> str:
    file = job.run / "status/rank-1.json"
    return str(json.loads(file.read_text())["phase"]) if file.exists() else ""


def test_one_pair_a_pass_is_the_same_training(alone: Job, tmp_path: Path) -> None:
    """Without patches, and with ranks of which one passes a pair through for the other's sake."""
    apart = ResolvedPacking(mode="OneDocument", reason="", patches=[])
    hyper = {**HYPER, "steps": 2}
    job = train(make_job(tmp_path, method=FULL, packing=apart, objective=PREFERENCE, hyper=hyper, bins=2), 3)
    found, expected = (json.loads(step_lines(one)[0]) for one in (job, alone))
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_its_defaults_are_gentler() -> None:
    assert defaults.learning_rate(10**9, "DPO", "Full") == 5e-7
    assert defaults.learning_rate(10**9, "SFT", "Full") == 2e-5
