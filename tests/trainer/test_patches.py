"""The patches against the plain model, on tiny models of many families, and the check that drops a wrong one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.trainer.families import examine
from tests.trainer.jobs import make_model, tiny_config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from tuneward_trainer import attention, norms, patches, rotary, verify
from tuneward_trainer.batch import collate

WITHOUT_PACKING = [name for name in patches.ALL if name != patches.PACKED_ATTENTION]


def test_a_wrong_patch_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that swallows the window: silently wrong in training, seen on the twin."""
    right = attention.packed_attention
    monkeypatch.setattr(
        patches, "packed_attention", lambda *given, **named: right(*given, **named | {"sliding_window": None})
    )
    verdict = examine(transformers.MistralConfig(sliding_window=4096))
    assert (verdict.mode, verdict.patches) == ("OneDocument", WITHOUT_PACKING)
    assert "gradients differ by" in verdict.reason


def test_a_patch_that_raises_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(patches._LoraLinear, "apply", broken)
    verdict = examine(transformers.LlamaConfig())
    assert verdict.patches == [name for name in patches.ALL if name != patches.LORA_LINEAR]
    assert "lora-linear left out: RuntimeError: no such kernel" in verdict.reason


class Novel(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """No small one can be made."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        if config.hidden_size < 1024:
            raise ValueError("hidden_size must be at least 1024")
        super().__init__(config)


def test_an_architecture_that_cannot_be_shrunk_is_trained_without_a_patch() -> None:
    verdict = verify._examine(Novel, transformers.LlamaConfig())
    assert (verdict.mode, verdict.patches) == ("OneDocument", [])
    assert verdict.reason == "no small twin of the model could be made: ValueError: hidden_size must be at least 1024"


def test_the_log_of_every_job_names_what_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where another job has asked before."""
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(patches._LoraLinear, "apply", None)
    for _ in range(2):
        caplog.clear()
        verdict = verify.verify(folder, tmp_path / "verify")
        (said,) = [record.getMessage() for record in caplog.records if record.name == verify.__name__]
        assert said == f"not used on this model: lora-linear; {verdict.reason}"


def test_the_verdict_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    first = verify.verify(folder, tmp_path / "verify")
    monkeypatch.setattr(verify, "_examine", None)
    assert verify.verify(folder, tmp_path / "verify") == first


@pytest.mark.parametrize("value", [1.0, torch.zeros(1), torch.zeros(2)])
def test_attention_refuses_what_it_does_not_know(value: Any) -> None:
    q = torch.randn(1, 2, 4, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="new_idea"):
        attention.packed_attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=cu, new_idea=value)


def normed(forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The result of rows of very different sizes, the gradient of these, and whether the result is kept for it."""
    torch.manual_seed(0)
    x = (torch.randn(5, 7, 32) * torch.logspace(-4, 3, 7)[:, None]).requires_grad_()
    kept: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(x)
    torch.autograd.backward(out, torch.randn_like(out))
    assert x.grad is not None
    assert (x.data_ptr() in kept) is not (out.data_ptr() in kept)
    return out.detach(), x.grad, out.data_ptr() in kept


@pytest.mark.parametrize("lost", [False, True], ids=["invertible", "with a weight of 0"])
def test_a_norm_keeps_its_result_where_its_input_can_be_had_from_it(lost: bool) -> None:
    norm = modeling_llama.LlamaRMSNorm(32, eps=1e-5).requires_grad_(False)
    assert norms.fits(norm)
    norm.weight.normal_()
    if lost:
        norm.weight[3] = 0
    right, gradient, _ = normed(norm)
    found, patched, kept = normed(functools.partial(norms.forward, norm, norms.invertible(norm)))
    assert kept is not lost
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    # By what is largest in a row: the others are differences of numbers of that size.
    assert float(((patched - gradient).abs() / gradient.abs().amax(-1, keepdim=True)).max()) < 2e-6


def test_norms_of_another_formula_are_left_alone() -> None:
    assert not norms.fits(GemmaRMSNorm(32))
    assert not norms.fits(torch.nn.LayerNorm(32))


# -- rotary embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["as a Linear gives them", "in one piece"])
def test_queries_and_keys_are_turned_as_transformers_does(layout: str) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, 7, heads, 16, dtype=torch.float64).transpose(1, 2) for heads in (4, 2))
    if layout == "in one piece":
        query, key = query.contiguous(), key.contiguous()
    cos, sin = (torch.randn(1, 7, 16, dtype=torch.float64) for _ in range(2))
    towards = [torch.randn_like(x) for x in (query, key)]

    def turned(rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        asked = [x.detach().requires_grad_() for x in (query, key)]
        found = rotate(*asked, cos, sin)
        return [*found, *torch.autograd.grad(found, asked, towards)]

    right = turned(modeling_llama.apply_rotary_pos_emb)
    found = turned(functools.partial(rotary._rotated, modeling_llama.apply_rotary_pos_emb))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        (modeling_llama, True),
        (modeling_qwen3, True),
        (modeling_gpt_neox, True),
        (modeling_glm, False),
        (modeling_gemma4, False),
    ],
)
def test_a_rotation_is_known_by_what_it_does(file: ModuleType, fits: bool) -> None:
    assert rotary.turns_halves(file.apply_rotary_pos_emb) is fits


def test_a_wrong_rotation_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the right one is what the model uses."""
    right = rotary._rotated
    monkeypatch.setattr(rotary, "_rotated", lambda original, q, k, cos, sin: right(original, q, k, sin, cos))
    verdict = examine(transformers.MistralConfig())
    assert verdict.patches == [name for name in patches.ALL if name != patches.ROTARY]
    assert "rotary left out: gradients differ by" in verdict.reason


def test_a_rotation_of_a_part_or_with_more_arguments_stays_the_models_own() -> None:
    asked: list[tuple[torch.Tensor, ...]] = []

    def original(*given: torch.Tensor, **named: int) -> Any:
        asked.append(given)
        return "its own"

    whole, part = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    rotate = functools.partial(rotary._rotated, original)
    assert rotate(whole, whole, part, part) == "its own"
    assert rotate(whole, whole, whole[0], whole[0], unsqueeze_dim=2) == "its own"
    assert rotate(whole, whole, whole[0, :1].double(), whole[0, :1].double()) == "its own"
    assert len(asked) == 3


# -- after the block the model is plain again --------------------------------------------------------------------------


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


def patched_step(model: PeftModel) -> None:
    batch = collate(enumerate(verify._documents()))
    with patches.applied(model) as forward:
        torch.autograd.backward(forward(batch).sum())


def test_generate_and_disable_adapter_are_right_after_a_patched_step() -> None:
    torch.manual_seed(0)
    model = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    ids = [5, 6, 7, 8]
    before = logits(model, ids)
    with model.disable_adapter():
        base = logits(model, ids)
    said = model.generate(input_ids=torch.tensor([ids, ids]), max_new_tokens=5, do_sample=False)
    patched_step(model)
    assert torch.equal(logits(model, ids), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    assert not torch.equal(before, base)
    assert torch.equal(model.generate(input_ids=torch.tensor([ids, ids]), max_new_tokens=5, do_sample=False), said)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_target_is_judged_by_all_other_tokens(cap: float | None) -> None:
    """With and without the patched head, packed and alone; with Gemma 2's soft-cap too."""
    torch.manual_seed(0)
    kind, config = transformers.LlamaForCausalLM, tiny_config()
    if cap is not None:
        kind, config = transformers.Gemma2ForCausalLM, transformers.Gemma2Config(final_logit_softcapping=cap)
    model = verify.twin(kind, config)
    documents = verify._documents()
    batch = collate(enumerate(documents))
    found = []
    for names in ((), patches.ALL, [patches.LOSS_HEAD]):
        with patches.applied(model, names) as forward:
            logprobs, right = forward.judged(batch)
            torch.testing.assert_close(logprobs, forward(batch).detach(), atol=1e-5, rtol=0)
            found.append(right)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    best = [logits(model, sample.ids.tolist())[0, :-1].argmax(-1)[sample.weights[1:] != 0] for sample in documents]
    assert torch.equal(found[0], (torch.cat(best) == batch.targets).float())


def test_disable_adapter_works_inside_the_block() -> None:
    torch.manual_seed(0)
    model = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    batch = collate(enumerate(verify._documents()))
    with torch.no_grad(), model.disable_adapter():
        with patches.applied(model, ()) as forward:
            plain = forward(batch)
        with patches.applied(model) as forward:
            assert torch.allclose(forward(batch), plain, atol=1e-5)


def test_a_second_model_of_the_process_is_not_patched() -> None:
    torch.manual_seed(0)
    model = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    other = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    expected = logits(other, [5, 6, 7, 8])
    with patches.applied(model):
        assert torch.equal(logits(other, [5, 6, 7, 8]), expected)


def test_the_block_restores_the_model_when_a_step_fails() -> None:
    model = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    with pytest.raises(ZeroDivisionError), patches.applied(model):
        raise ZeroDivisionError
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_a_bf16_base_keeps_fp32_adapters() -> None:
    model = verify.twin(transformers.LlamaForCausalLM, tiny_config())
    base = model.get_base_model()
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    patched_step(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)
