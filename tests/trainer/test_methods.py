"""DoRA from a job's plan to an engine that answers with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tests.trainer.jobs import VOCABULARY, Gang, Job, filed, make_job, tiny_config, train
from transformers import DynamicCache, LlamaForCausalLM

from tuneward_api.files import Proof
from tuneward_serving.agent import adapter_check
from tuneward_serving.agent.proof import Measured, judge
from tuneward_serving.agent.weights import read_header
from tuneward_serving.engine.generation import BASE
from tuneward_serving.engine.runner import Runner
from tuneward_trainer import patches, verify
from tuneward_trainer.batch import collate
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import adapter_parameters, add_adapters, trainable


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank, never interrupted."""
    return train(make_job(tmp_path_factory.mktemp("store"), method={"type": "DoRA"}))


def adapted(job: Job, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A random model with a DoRA that is not at its beginning."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(vocab_size=verify.VOCABULARY)).to(dtype)
    base.requires_grad_(False)
    base.eval()
    model = add_adapters(base, job.plan.prepared.method, seed=3, base_uri="")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_every_length_is_trained_and_counted(dora: Job) -> None:
    model = adapted(dora)
    names = [name for name in trainable(model) if "lora_magnitude_vector" in name]
    assert len(names) == 2 * 7
    counted = adapter_parameters(model.get_base_model(), ["base_layer"], 4, dora=True)
    assert counted == sum(parameter.numel() for parameter in trainable(model).values())


def test_the_lora_patch_steps_aside_and_the_others_are_right(dora: Job) -> None:
    model = adapted(dora)
    assert not any(patches.fits_lora_linear(module) for module in model.modules())
    reference = verify.gradients(model, None)
    assert verify.disagreement(model, patches.ALL, reference) is None
    lengths = [value for name, value in reference.items() if "lora_magnitude_vector" in name]
    assert all(bool(value.any()) for value in lengths)


def test_rank_stabilised_lora_is_divided_by_the_root_of_its_rank(dora: Job, tmp_path: Path) -> None:
    """Kalajdzievski 2023, arXiv 2312.03732; by the patch too, and whoever loads the adapter is told."""
    plan = dora.plan.prepared.method.model_copy(update={"type": "LoRA", "rs_lora": True})
    assert (plan.rank, plan.alpha) == (4, 8.0)
    job = Job(dora.store, dora.plan.model_copy(update={"prepared": dora.plan.prepared.model_copy(update={"method": plan})}))
    model = adapted(job)
    fitting = [module for module in model.modules() if patches.fits_lora_linear(module)]
    assert [module.scaling["default"] for module in fitting] == [8.0 / 4**0.5] * 14
    assert verify.disagreement(model, patches.ALL, verify.gradients(model, None)) is None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True


def test_a_bf16_base_keeps_fp32_adapters(dora: Job) -> None:
    model = adapted(dora, torch.bfloat16)
    batch = collate(enumerate(verify._documents()))
    with patches.applied(model) as forward:
        torch.autograd.backward(cross_entropy(forward(batch), batch))
    gradients = [parameter.grad for parameter in trainable(model).values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("worlds", [(2,), (1, 2)])
def test_any_number_of_ranks_and_any_kill_give_the_same_adapter(dora: Job, worlds: tuple[int, ...]) -> None:
    job = dora.again("dora-" + "-".join(map(str, worlds)))
    for world in worlds[:-1]:
        gang = Gang(job, world)
        gang.until(lambda gang=gang: any((job.run / "checkpoints").glob("*/MANIFEST.json")) and gang.steps() >= 4)  # type: ignore[misc]
        gang.processes[0].kill()
        gang.wait()
    train(job, worlds[-1])
    assert job.adapter() == dora.adapter()
    assert (job.results()[0].from_step > 0) == (len(worlds) > 1)


def test_a_dora_ends_in_a_model_that_answers(dora: Job) -> None:
    """finish files it, the agent's checks take it, and the engine computes what the trainer proved, also in a batch
    with rows of the base model."""
    adapter = filed(dora)
    assert (adapter.type, adapter.rank) == ("DoRA", 4)
    folder, model = dora.store / adapter.sub_path, dora.store / "models/tiny"
    shapes = adapter_check.base_shapes(read_header(model / "model.safetensors"))
    adapter_check.check_structure(folder / "adapter", shapes, adapter_check.Limits(max_adapters=1, max_rank=4))
    runner = Runner(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), SimpleNamespace(eos_token_id=None))
    runner.load("a0", folder / "adapter")
    proof = Proof.model_validate_json((folder / "proof.json").read_bytes())
    judge(proof.model_copy(update={"tolerance": 1e-4}), [answers(runner, text.ids) for text in proof.texts])
    runner.unload("a0")
    judge_base = answers(runner, proof.texts[0].ids, slots=(BASE, BASE))
    assert judge_base.tuned == pytest.approx(proof.texts[0].base, abs=1e-4)


def answers(runner: Runner, ids: list[int], slots: tuple[str, str] = (BASE, "a0")) -> Measured:
    """Both rows in one forward."""
    rows = torch.tensor([ids, ids])
    logits = runner.forward(
        rows,
        mask=torch.ones_like(rows),
        positions=torch.arange(len(ids)).expand(2, -1),
        cache=DynamicCache(),
        slots=slots,
        keep=0,
    )
    assert logits.shape == (2, len(ids), VOCABULARY)
    found = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].tolist()
    return Measured(*found)


def test_the_adapter_s_config_says_that_it_is_a_dora(dora: Job) -> None:
    folder: Path = dora.run / str(dora.results()[0].adapter_directory)
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["use_dora"] is True
