"""Jobs whose ranks share the frozen base model: the same losses and the same adapter, to the byte, as with a base model that each
rank has whole; killed, resumed, and on other numbers of ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.jobs import PREFERENCE, Gang, Job, make_job, make_model, step_lines, tiny_config, train
from tests.trainer.test_evaluation import HELD_OUT, TALK, generations, talks
from tests.trainer.test_exactness import spin
from transformers import LlamaForCausalLM

from tuneward_api import manifest
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import patches

APART = ResolvedPacking(mode="OneDocument", reason="", patches=["lora-linear"])
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "QLoRA": {"method": {"type": "QLoRA"}, "config": tiny_config(hidden_size=64, intermediate_size=64)},
    "DoRA, one document a pass, dropout": {"method": {"type": "DoRA", "dropout": 0.1}, "packing": APART},
    "DPO, one pair a micro-batch": {"objective": PREFERENCE, "packing": APART, "bins": 2},
}
SPEC = {"evaluation": {"everySteps": 2}, "datasets": HELD_OUT, "checkpoint": {"everySteps": 2}}


def sharded(job: Job, name: str) -> Job:
    """The same job with a base model that ranks share, and a run directory of its own."""
    prepared = job.plan.prepared.model_copy(update={"base_weights": "Sharded"})
    return Job(job.store, job.plan.model_copy(update={"prepared": prepared}), job.environment).again(name)


def said(job: Job) -> str:
    return (job.run / "ranks.log").read_text()


def losses(job: Job) -> list[Any]:
    lines = [json.loads(line) for line in step_lines(job)]
    return [(line["step"], line["train_loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_a_shared_base_model_gives_the_bytes_of_a_whole_one(tmp_path: Path, case: str) -> None:
    """Three ranks, of which some have a micro-batch less than others; validation, reference and proof are of all ranks."""
    alone = train(make_job(tmp_path, spec=SPEC, hyper={"steps": 4}, **CASES[case]))
    job = train(sharded(alone, "sharded"), 3)
    assert "the base model is sharded over 3 ranks" in said(job)
    assert losses(job) == losses(alone)
    assert job.adapter() == alone.adapter()
    one, other = alone.results()[0], job.results()[0]
    assert other.metrics.validation_loss_after == one.metrics.validation_loss_after is not None
    # With its proof.
    assert other.adapter_digest == one.adapter_digest


def test_killed_and_on_other_numbers_of_ranks_it_is_the_same_to_the_byte(tmp_path: Path) -> None:
    """From a bf16 file, of which a rank's share alone becomes fp32. The last gang has one rank, and so the whole model."""
    folder = make_model(tmp_path / "models/tiny")
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    manifest.write_manifest(folder)
    alone = train(make_job(tmp_path, spec=SPEC, hyper={"steps": 16}))
    job, moment = sharded(alone, "killed"), random.Random(3)
    for number, world in enumerate((4, 2), start=1):
        gang = Gang(job, world)
        gang.until(lambda gang=gang, number=number: gang.steps() >= 3 and attempts(gang) == number)  # type: ignore[misc]
        spin(moment.uniform(0, 0.05))
        gang.processes[moment.randrange(world)].kill()
        assert gang.wait().count(-9) == 1
    train(job, 1)
    assert job.adapter() == alone.adapter()
    assert job.results()[0].from_step > 0
    assert job.results()[0].resume == "exact"


def attempts(gang: Gang) -> int:
    return len(list((gang.job.run / "attempts").iterdir()))


def test_answers_are_written_by_all_ranks(tmp_path: Path) -> None:
    """Each token is a pass of all. And what all hold is not compiled, since one could fail to, for whom the others would wait."""
    talks(tmp_path)
    hyper = {"steps": 20, "learning_rate": 2e-2, "batch_tokens": 64, "scheduler": "Constant", "warmup_fraction": 0.0}
    packing = ResolvedPacking(mode="Packed", reason="", patches=[*patches.ALL, patches.COMPILED])
    job = sharded(make_job(tmp_path, spec=TALK, hyper=hyper, packing=packing), "talks")
    job.environment["TUNEWARD_COMPILE"] = "1"
    train(job, 2)
    assert "layers are compiled" not in said(job)
    metrics = job.results()[0].metrics
    assert (metrics.task_score_before, metrics.task_score_after) == (0.0, 1.0)
    assert [one["model"] for one in generations(job)] == ["base", "base", "tuned", "tuned"]
