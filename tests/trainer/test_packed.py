"""QLoRA: adapters on weights of four bits, from a job's plan to an engine that answers on the plain base."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.trainer.jobs import TARGETS, Gang, Job, filed, make_job, make_model, step_lines, tiny_config, train
from tests.trainer.quantised import to_fp8
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from tuneward_api.files import Proof
from tuneward_api.finetunejob import Method
from tuneward_api.resolved import ResolvedMethod
from tuneward_serving.agent.proof import Measured, judge
from tuneward_serving.engine.generation import BASE
from tuneward_serving.engine.runner import Runner
from tuneward_trainer import defaults, nf4, patches, proof, verify
from tuneward_trainer.batch import collate
from tuneward_trainer.facts import examine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, load_base, packable, trainable
from tuneward_trainer.report import EndError

CPU = torch.device("cpu")
METHOD = ResolvedMethod(
    type="QLoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
)


def config(**changes: Any) -> transformers.LlamaConfig:
    """Wide enough for whole blocks."""
    return tiny_config(hidden_size=64, intermediate_size=128, **changes)


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank, never interrupted."""
    return train(make_job(tmp_path_factory.mktemp("store"), method={"type": "QLoRA"}, config=config()))


def adapted(dtype: torch.dtype = torch.float32) -> PeftModel:
    """A random packed model with a LoRA that is not at its beginning."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config(vocab_size=verify.VOCABULARY)).to(dtype)
    base.requires_grad_(False)
    nf4.pack(base, packable(base), CPU)
    base.eval()
    model = add_adapters(base, METHOD, seed=3, base_uri="")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.05)
    return model


# -- the weights -------------------------------------------------------------------------------------------------------


def test_weights_are_packed_while_they_are_read_whatever_their_form(tmp_path: Path) -> None:
    """From plain files by transformers, one by one; from fp8 after these are plain: the same bytes as packed by hand. The
    head stays."""
    for packed_before in (False, True):
        folder = make_model(tmp_path / f"model-{packed_before}", config(tie_word_embeddings=False))
        if packed_before:
            to_fp8(folder, block=16)
        plain, read = load_base(folder, CPU), load_base(folder, CPU, packed=True)
        linears = packable(plain)
        assert [name for name, module in read.named_modules() if nf4.is_packed(module)] == list(linears)
        assert type(read.lm_head) is nn.Linear
        for name, layer in linears.items():
            found = nf4.unpacked(read.get_submodule(name))
            # NF4's error on normal numbers (Dettmers et al. 2023); a block read wrongly is off by more than their size.
            assert float((found - layer.weight).norm() / layer.weight.norm()) < 0.11
        nf4.pack(plain, linears, CPU)
        for name in linears:
            ours, theirs = plain.get_submodule(name), read.get_submodule(name)
            assert torch.equal(ours.weight, theirs.weight)
            assert torch.equal(nf4.unpacked(ours), nf4.unpacked(theirs))


def test_a_linear_whose_rows_are_no_whole_blocks_stays_plain() -> None:
    base = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=96))
    assert {name.rsplit(".", 1)[-1] for name in packable(base)} == set(TARGETS) - {"down_proj"}


def test_a_pass_without_gradients_leaves_the_weights_as_they_are() -> None:
    """bitsandbytes would pack them anew for a CPU with AVX512-BF16, and training go on with wrong ones."""
    model = adapted(torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    before = layer.weight.data.clone()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(layer.weight.data, before)


# -- the patches -------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_peft_and_bitsandbytes() -> None:
    model = adapted()
    assert sum(patches.fits_lora_linear(module) for module in model.modules()) == 14
    reference = verify.gradients(model, None)
    worst, where = verify.worst_error(verify.gradients(model, patches.ALL), reference)
    assert worst < 1e-5, where
    batch = collate(enumerate(verify._documents()))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with patches.applied(model) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(forward(batch), batch)
    assert not [tensor for tensor in kept if tensor.numel() == 64 * 128 and tensor.shape[0] in (64, 128)], (
        "an unpacked weight"
    )


def test_a_bf16_base_keeps_fp32_adapters() -> None:
    model = adapted(torch.bfloat16)
    batch = collate(enumerate(verify._documents()))
    with patches.applied(model) as forward:
        torch.autograd.backward(cross_entropy(forward(batch), batch))
    gradients = [parameter.grad for parameter in trainable(model).values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


def test_the_twin_of_a_packed_model_is_packed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", config())
    verdict = verify.verify(folder, tmp_path / "verify", packed=True)
    assert (verdict.mode, verdict.patches) == ("Packed", list(patches.ALL))
    assert verify.verify(folder, tmp_path / "verify").patches == list(patches.ALL)
    assert len(list((tmp_path / "verify").iterdir())) == 2


# -- a job -------------------------------------------------------------------------------------------------------------


def test_the_loss_falls(qlora: Job) -> None:
    losses = [json.loads(line)["train_loss"] for line in step_lines(qlora)]
    assert losses[-1] < 0.9 * losses[0]


def test_any_number_of_ranks_and_any_kill_give_the_same_adapter(qlora: Job) -> None:
    job = qlora.again("qlora-again")
    gang = Gang(job)
    gang.until(lambda: any((job.run / "checkpoints").glob("*/MANIFEST.json")) and gang.steps() >= 4)
    gang.processes[0].kill()
    gang.wait()
    train(job, 2)
    assert job.adapter() == qlora.adapter()
    result = job.results()[0]
    assert (result.from_step > 0, result.resume) == (True, "exact")


def test_it_ends_in_a_model_that_answers_on_the_plain_base(qlora: Job) -> None:
    """Its proof is of the base that is served: plain PEFT and the engine agree with it, and the packed model does not."""
    adapter = filed(qlora)
    assert adapter.type == "LoRA"
    folder, model = qlora.store / adapter.sub_path, qlora.store / "models/tiny"
    proved = Proof.model_validate_json((folder / "proof.json").read_bytes())
    peft = PeftModel.from_pretrained(load_base(model, CPU), folder / "adapter")
    assert proof.logprobs(peft, proved.texts[0].ids) == pytest.approx(proved.texts[0].tuned, abs=1e-4)
    packed = PeftModel.from_pretrained(load_base(model, CPU, packed=True), folder / "adapter")
    assert proof.logprobs(packed, proved.texts[0].ids) != pytest.approx(proved.texts[0].tuned, abs=proved.tolerance)
    runner = Runner(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), SimpleNamespace(eos_token_id=None))
    runner.load("a0", folder / "adapter")
    judge(proved.model_copy(update={"tolerance": 1e-4}), [answers(runner, text.ids) for text in proved.texts])
    assert not list(qlora.run.glob("tmp*")), "what was streamed is gone"


def answers(runner: Runner, ids: list[int]) -> Measured:
    rows = torch.tensor([ids, ids])
    positions = torch.arange(len(ids)).expand(2, -1)
    logits = runner.forward(
        rows, mask=torch.ones_like(rows), positions=positions, cache=DynamicCache(), slots=(BASE, "a0"), keep=0
    )
    return Measured(*logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].tolist())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_machine_without_bitsandbytes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(nf4, "release", absent)
    with pytest.raises(EndError, match=r"spec.method.type is QLoRA, for which bitsandbytes must be installed.*or use LoRA"):
        defaults.method(Method(type="QLoRA"), examine(make_model(tmp_path, config())))


def test_a_model_that_is_mostly_experts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "config.json"
    small = transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"], hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96
    )
    folder.write_text(json.dumps(small.to_dict()))
    with pytest.raises(EndError, match=r"QLoRA, which can pack only \d+ of the model's \d+ parameters.*use LoRA"):
        defaults.method(Method(type="QLoRA"), examine(tmp_path))
