"""A training that goes wrong ends with a sentence; one that only has a hard batch goes on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.jobs import Gang, Job, make_job, make_model, tiny_config, train
from transformers import LlamaForCausalLM

from tuneward_api import manifest
from tuneward_api.conditions import Reason
from tuneward_trainer import rundir
from tuneward_trainer.data.documents import TRAINING, DocumentWriter
from tuneward_trainer.divergence import PATIENCE, LossWatch, advice, exploded, listing
from tuneward_trainer.progress import read_ranks

UNIFORM = math.log(32_000)

# -- the rule ----------------------------------------------------------------------------------------------------------


def diverged_at(losses: Iterable[float]) -> int | None:
    """The step, from 1."""
    curve = list(losses)
    watch = LossWatch(UNIFORM)
    return next((step for step, loss in enumerate(curve, 1) if watch.see(loss, last=step == len(curve))), None)


def falling(random: random.Random, steps: int, start: float, end: float, noise: float) -> list[float]:
    """Exponentially from `start` to `end`, each loss times a log-normal factor."""
    return [(end + (start - end) * math.exp(-4 * step / steps)) * math.exp(random.gauss(0, noise)) for step in range(steps)]


def spikes(random: random.Random, steps: int, share: float, height: float) -> list[float]:
    """One sample a step, of which `share` are hard."""
    return [height if random.random() < share else 1.0 for _ in range(steps)]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("quiet", lambda r: falling(r, 500, 2.5, 1.2, 0.05)),
        ("small batches", lambda r: falling(r, 500, 2.5, 1.2, 0.5)),
        ("learnt by heart", lambda r: falling(r, 500, 3.0, 0.005, 1.0)),
        ("a hard sample now and then", lambda r: spikes(r, 1000, 0.05, 9.0)),
        ("every third sample is hard", lambda r: spikes(r, 1000, 0.3, 6.0)),
        ("easy samples first, by chance", lambda r: [0.3] * 3 + falling(r, 200, 3.0, 2.0, 0.3)),
        ("epochs", lambda r: [loss for level in (2.0, 1.2, 0.5) for loss in falling(r, 60, level, level, 0.2)]),
        ("five steps", lambda r: falling(r, 5, 3.0, 1.0, 0.5)),
        ("nothing learnt", lambda r: falling(r, 300, 4.0, 4.0, 0.3)),
        ("a preference loss", lambda r: falling(r, 300, math.log(2), 0.02, 0.8)),
    ],
)
def test_noise_is_no_divergence(name: str, make: Any) -> None:
    assert [seed for seed in range(100) if diverged_at(make(random.Random(f"{name} {seed}"))) is not None] == []


FLAT = [2.0] * 40


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ([2.0, 30.0, 60.0, 70.0, 80.0, 90.0, 100.0], 6),
        ([*FLAT, *[12.0] * 10], 45),
        # Up over twenty steps, as a rate that is too high does it.
        ([*FLAT, *[2.0 * 1.1**step for step in range(40)]], 53),
        # From what was learnt by heart to a plateau that a base model would start at.
        ([*falling(random.Random(0), 100, 3.0, 0.02, 0.1), *[4.0] * 10], 105),
        # Five steps in all: the last one decides with what there is.
        ([3.0, 20.0, 40.0, 50.0, 60.0], 5),
        ([*FLAT, 50.0, 60.0], 42),
        # A spike before does not hide it.
        ([*FLAT, 900.0, 2.0, *[50.0] * 10], 47),
        # One spike, two, four in a row: noise.
        ([*FLAT, 50.0, *FLAT], None),
        ([*FLAT, 50.0, 900.0, *FLAT, 60.0, 70.0, 80.0, 90.0, *FLAT], None),
        ([*FLAT, 50.0], None),
        # Worse, but not far above what was before.
        ([*FLAT, *[3.9] * 30], None),
        # Few losses are known, and a blind guess would have more.
        ([0.2, *[9.0] * 30], None),
        # It only gets worse, slowly: for the validation loss to tell.
        ([2.0 + 0.01 * step for step in range(300)], None),
    ],
)
def test_several_steps_far_above_all_before_are(curve: list[float], step: int | None) -> None:
    assert diverged_at(curve) == step


def test_suspicion_ends_with_a_sound_loss() -> None:
    watch = LossWatch(UNIFORM, sound=list(FLAT))
    assert (watch.suspected, watch.highest, watch.bar) == (False, 2.0, 4.0)
    assert not watch.see(50.0)
    assert (watch.suspected, watch.suspects) == (True, [50.0])
    assert not watch.see(1.0)
    assert watch == LossWatch(UNIFORM, sound=[*FLAT, 4.0, 1.0])


def test_it_remembers_no_more_than_it_compares_with() -> None:
    watch = LossWatch(UNIFORM)
    for step in range(200):
        watch.see(float(step % 3))
    assert len(watch.sound) == 80
    again = LossWatch(UNIFORM, **json.loads(json.dumps(watch.memory())))
    assert again == watch


# -- sentences -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    file: str
    line: int


def test_the_sentence_has_losses_steps_and_what_was_before() -> None:
    watch = LossWatch(UNIFORM, sound=list(FLAT), suspects=[30.0, 41.5])
    assert exploded(watch, step=42) == "the loss exploded: 30, 41.5 at steps 41 to 42, after at most 2 before"


@pytest.mark.parametrize(("rate", "value"), [(0.5, "0.0004"), (4e-4, "0.0001"), (3e-5, "8e-06")])
def test_the_advice_names_a_value(rate: float, value: str) -> None:
    assert advice(rate, 4e-4) == f"lower spec.hyperparameters.learningRate from {rate:g} to {value}"


def test_samples_are_listed_by_file() -> None:
    samples = [Sample("a.jsonl", 3), Sample("a.jsonl", 7), Sample("b.jsonl", 1)]
    assert listing(samples) == "a.jsonl:3, 7; b.jsonl:1"
    assert listing([Sample("a.jsonl", line) for line in range(1, 12)]) == "a.jsonl:1, 2, 3, 4, 5, 6, 7, 8 and 3 more"


# -- jobs ----------------------------------------------------------------------------------------------------------------


def ending_of(job: Job, world: int) -> dict[str, Any]:
    gang = Gang(job, world)
    assert gang.wait() == [1] * world, gang.said()
    endings = [json.loads((job.run / f"status/ending-{rank}.json").read_text()) for rank in range(world)]
    assert len({(ending["reason"], ending["message"]) for ending in endings}) == 1
    found: dict[str, Any] = endings[0]
    return found


def saved(job: Job) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(file.parent.name[5:13]) for file in (job.run / "checkpoints").glob("*/MANIFEST.json"))


def sure_of_itself(store: Path) -> None:
    """A random model with a loud head, and texts that it wrote: what it knows it can forget, and then it is very wrong."""
    model = make_model(store / "models/tiny", tiny_config(tie_word_embeddings=False))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 8
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    manifest.write_manifest(model)
    writer = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    with DocumentWriter(store / "data/tiny" / TRAINING, ["pvc://claim/chats.jsonl"]) as documents:
        for line in range(18):
            ids = [3 + line]
            while len(ids) < 12 + line:
                ids.append(int(torch.multinomial(logits(writer, ids).softmax(-1), 1)))
            documents.add(ids, [0.0] + [1.0] * (len(ids) - 1), file=0, line=line + 1)
    manifest.write_manifest(store / "data/tiny")


@torch.inference_mode()
def logits(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Of the next token."""
    found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return found


def explosive(store: Path) -> Job:
    """The rate climbs for a hundred steps: what it begins with is harmless, what it comes to is not."""
    sure_of_itself(store)
    rate = {"learning_rate": 0.2, "warmup_fraction": 1.0, "scheduler": "Constant", "steps": 100, "max_grad_norm": 1e6}
    return make_job(store, hyper=rate, spec={"checkpoint": {"everySteps": 1, "keep": 100}})


@pytest.fixture(scope="module")
def exploding(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained to its end by one rank."""
    job = explosive(tmp_path_factory.mktemp("store"))
    assert ending_of(job, 1)["reason"] == Reason.NUMERICAL_DIVERGENCE
    return job


def test_an_explosion_is_told_with_steps_samples_and_a_rate(exploding: Job) -> None:
    said = json.loads((exploding.run / "status/ending-0.json").read_text())["message"]
    assert said.startswith("the loss exploded: ")
    assert "lower spec.hyperparameters.learningRate from 0.2 to 0.0004; samples of step " in said
    record = json.loads((rundir.attempt_directory(exploding.run, 1) / "diverged.json").read_text())
    assert said.startswith(record["what"])
    assert record["samples"][0]["file"] == "pvc://claim/chats.jsonl"
    assert said.endswith(listing([Sample(**sample) for sample in record["samples"]]))


def test_no_checkpoint_holds_a_state_that_gave_a_suspect_loss(exploding: Job) -> None:
    record = json.loads((rundir.attempt_directory(exploding.run, 1) / "diverged.json").read_text())
    first = len(record["losses"]) - PATIENCE + 1
    steps = saved(exploding)
    assert steps[:30] == list(range(1, 31))
    # A step has the loss of the state before its update: the first suspect one judges the state of one update less.
    assert first - 5 < steps[-1] < first - 1
    # What the rank said last, of which the result is made, names what the next try goes on from.
    (said,) = read_ranks(exploding.run / "status")
    assert said["checkpoint"]["step"] == steps[-1]


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_agree_and_any_number_of_them_does(exploding: Job, world: int) -> None:
    job = exploding.again(f"world-{world}")
    told = json.loads((exploding.run / "status/ending-0.json").read_text())["message"]
    assert ending_of(job, world)["message"] == told
    assert saved(job) == saved(exploding)


def test_the_next_try_goes_on_before_it_and_comes_to_the_same(exploding: Job) -> None:
    told = json.loads((exploding.run / "status/ending-0.json").read_text())["message"]
    job = exploding.again("twice")
    for attempt in (1, 2):
        assert ending_of(job, 1)["message"] == told
        assert rundir.attempt_numbers(job.run)[-1] == attempt
    start = json.loads((rundir.attempt_directory(job.run, 2) / "start.json").read_text())
    assert start["fromStep"] == saved(job)[-1] == saved(exploding)[-1]


def test_a_kill_in_the_middle_changes_nothing(exploding: Job) -> None:
    told = json.loads((exploding.run / "status/ending-0.json").read_text())["message"]
    job = exploding.again("killed")
    gang = Gang(job, 2)
    gang.until(lambda: gang.steps() >= 1 and bool(saved(job)))
    gang.processes[1].kill()
    assert gang.wait().count(-9) == 1
    assert ending_of(job, 1)["message"] == told


def test_a_damaged_weight_of_the_base_model_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    model = job.store / "models/tiny"
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, :2] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    manifest.write_manifest(model)
    for world in (1, 2):
        ending = ending_of(job.again(f"world-{world}"), world)
        assert ending["reason"] == Reason.NUMERICAL_DIVERGENCE
        assert ending["message"] == (
            f"the validation loss is not finite after step 0; the base model is damaged: {name} holds 2 numbers that are "
            "not finite; bring it in again, or name another spec.model.uri"
        )


def test_a_sound_training_is_the_same_with_checkpoints_at_every_step(tmp_path: Path) -> None:
    """A copy is written one step later, once it is known to be good; the last one at once."""
    job = train(make_job(tmp_path, spec={"checkpoint": {"everySteps": 1, "keep": 100}}))
    assert saved(job) == list(range(1, 13))
