"""The same bytes on any number of ranks and after any kill: real processes, killed for real."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.trainer.jobs import Gang, Job, make_job, step_lines, train
from transformers import LlamaForCausalLM

from tuneward_api.files import Proof
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import rundir
from tuneward_trainer.proof import logprobs

SLOWLY = [pytest.param((world, world, 1), seed, marks=pytest.mark.slow) for world in (1, 2, 3) for seed in range(1, 11)]
"""Thirty more seeds of kills."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank, never interrupted."""
    return train(make_job(tmp_path_factory.mktemp("store")))


def test_any_number_of_ranks_gives_the_same_adapter(alone: Job) -> None:
    for world in (2, 3, 4, 5):
        assert train(alone.again(f"world-{world}"), world).adapter() == alone.adapter()


def test_the_losses_are_those_of_before(alone: Job) -> None:
    """A change that moves them says why, and writes the file anew from what this test shows."""
    lines = [json.loads(line) for line in step_lines(alone)]
    found = {"train_loss": [line["train_loss"] for line in lines], "grad_norm": [line["grad_norm"] for line in lines]}
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
    assert found == {name: pytest.approx(values, rel=2e-4) for name, values in golden.items()}


def test_the_result_says_what_was_trained(alone: Job) -> None:
    (result,) = alone.results()
    assert (result.outcome, result.exit_code, result.step, result.resume) == ("Succeeded", 0, 12, "exact")
    metrics = result.metrics
    assert metrics.validation_loss_before != metrics.validation_loss_after
    assert result.checkpoint is not None
    assert result.checkpoint.step == 12
    lines = [json.loads(line) for line in step_lines(alone)]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize(("worlds", "seed"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((4, 2, 3), 0), *SLOWLY])
def test_killed_at_any_instruction_gives_the_same_adapter(alone: Job, worlds: tuple[int, ...], seed: int) -> None:
    """Each gang but the last is killed at a random moment; also the number of ranks may change between them."""
    job = alone.again("killed-" + "-".join(map(str, (*worlds, seed))))
    moment = random.Random(f"{worlds} {seed}")
    for number, world in enumerate(worlds[:-1], start=1):
        gang = Gang(job, world)
        wanted = moment.randint(3, 5)
        gang.until(lambda gang=gang, wanted=wanted, number=number: _progressed(gang, wanted, number))  # type: ignore[misc]
        # Anywhere in the next step: in a forward pass, a reduction, an update or in the middle of a checkpoint.
        spin(moment.uniform(0, 0.05))
        victim = gang.processes[moment.randrange(world)]
        victim.kill()
        # The others notice by themselves.
        assert gang.wait().count(-9) == 1
    train(job, worlds[-1])
    assert job.adapter() == alone.adapter()
    assert job.results()[0].from_step > 0
    assert job.results()[0].resume == "exact"


def _progressed(gang: Gang, steps: int, attempt: int) -> bool:
    """This attempt made so many steps, and there is something to go on from."""
    saved = any((gang.job.run / "checkpoints").glob("*/MANIFEST.json"))
    return saved and rundir.attempt_numbers(gang.job.run)[-1:] == [attempt] and gang.steps() >= steps


def spin(seconds: float) -> None:
    """A random moment is the point here, not a wait for something."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_killed_on_a_full_disk_it_is_the_same_once_there_is_room(alone: Job) -> None:
    """No file of any rank can grow any more while some steps are made; then one of them is killed."""
    job, moment = alone.again("full"), random.Random(7)
    gang = Gang(job, 2)
    gang.until(lambda: _progressed(gang, 3, 1))
    for process in gang.processes:
        assert process.pid is not None
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    spin(moment.uniform(0, 0.05))
    gang.processes[moment.randrange(2)].kill()
    assert gang.wait().count(-9) == 1
    train(job, 3)
    assert job.adapter() == alone.adapter()
    assert job.results()[0].from_step > 0


def test_survivors_of_a_kill_ask_for_another_try(alone: Job) -> None:
    job = alone.again("survivor")
    gang = Gang(job, 2)
    gang.until(lambda: gang.steps() >= 1)
    gang.processes[1].kill()
    assert gang.wait() == [75, -9]
    (ending,) = [json.loads(file.read_text()) for file in (job.run / "status").glob("ending-*.json")]
    assert ending["secondary"]
    assert ending["message"].startswith("another rank went away")


def test_dropout_is_the_same_on_any_number_of_ranks_and_after_a_stop(tmp_path: Path) -> None:
    # Everything that it runs has a deterministic kernel: else the job would end with the kernel's name.
    spec = {"hyperparameters": {"deterministic": True}}
    job = make_job(tmp_path, spec=spec, method={"dropout": 0.2}, hyper={"steps": 5})
    train(job)
    other = job.again("two")
    gang = Gang(other, 2)
    gang.until(lambda: gang.steps() >= 1)
    gang.processes[1].terminate()
    assert gang.wait() == [143, 143]
    stopped = other.results()[0]
    assert (stopped.outcome, stopped.exit_code) == ("Stopped", 143)
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.step == stopped.step
    train(other, 1)
    assert other.results()[0].from_step == stopped.step
    assert other.adapter() == job.adapter()


def test_packed_rows_equal_one_document_a_forward(alone: Job) -> None:
    """The same documents in each step, so the same training but for rounding; also without any patch."""
    prepared = alone.plan.prepared.model_copy(
        update={"packing": ResolvedPacking(mode="OneDocument", reason="asked", patches=[])}
    )
    single = make_job(alone.store).again("single")
    single = Job(single.store, single.plan.model_copy(update={"prepared": prepared}), single.environment)
    single.plan_file.write_text(single.plan.model_dump_json(by_alias=True, exclude_none=True))
    train(single)
    found, expected = (json.loads(step_lines(job)[-1])["train_loss"] for job in (single, alone))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_adapter_loads_in_plain_peft_and_gives_the_proofs_logprobs(alone: Job) -> None:
    folder = alone.run / str(alone.results()[0].adapter_directory)
    assert sorted(file.name for file in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = LlamaForCausalLM.from_pretrained(alone.store / "models/tiny", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    proof = Proof.model_validate_json((folder / "proof.json").read_bytes())
    assert sum(len(text.tuned) for text in proof.texts) >= 32
    for text in proof.texts:
        assert logprobs(tuned, text.ids) == pytest.approx(text.tuned, abs=2e-5)
        assert text.tuned != pytest.approx(text.base, abs=10 * proof.tolerance)
        with tuned.disable_adapter():
            assert logprobs(tuned, text.ids) == pytest.approx(text.base, abs=2e-5)


def test_the_adapters_config_is_sorted_and_names_the_base(alone: Job) -> None:
    folder = alone.run / str(alone.results()[0].adapter_directory) / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "pvc://claim/tiny"
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 7 * 2
