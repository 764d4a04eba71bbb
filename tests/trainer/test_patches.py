"""The patches against the plain model, on tiny models of many families, and the check that drops a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.trainer.jobs import make_model, tiny_config
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import attention, patches, verify
from tuneward_trainer.batch import collate
from tuneward_trainer.model import ModelUnsupportedError, load_base, model_class, target_linears

EVERY_PATCH = {
    "llama": transformers.LlamaConfig(),
    "mistral": transformers.MistralConfig(sliding_window=4096),
    "qwen2": transformers.Qwen2Config(),
    "qwen3": transformers.Qwen3Config(),
    "gemma": transformers.GemmaConfig(),
    "gemma2": transformers.Gemma2Config(),
    "gemma3_text": transformers.Gemma3TextConfig(),
    "phi3": transformers.Phi3Config(),
    "olmo2": transformers.Olmo2Config(),
    "smollm3": transformers.SmolLM3Config(),
    "granite": transformers.GraniteConfig(logits_scaling=3.0),
    "mixtral": transformers.MixtralConfig(),
    "cohere2": transformers.Cohere2Config(),
    "gpt_oss": transformers.GptOssConfig(),
    "glm": transformers.GlmConfig(),
    "qwen3_moe": transformers.Qwen3MoeConfig(),
}
ONE_DOCUMENT = {
    # Its distance bias is no argument of attention.
    "bloom": transformers.BloomConfig(),
    # It does not pass the bounds down.
    "stablelm": transformers.StableLmConfig(),
}
WITHOUT_PACKING = [name for name in patches.ALL if name != patches.PACKED_ATTENTION]


def examine(config: PreTrainedConfig) -> ResolvedPacking:
    return verify._examine(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]), config)


@pytest.mark.parametrize("family", EVERY_PATCH)
def test_every_patch_agrees_with_the_plain_model(family: str) -> None:
    verdict = examine(EVERY_PATCH[family])
    assert (verdict.mode, verdict.patches) == ("Packed", list(patches.ALL)), verdict.reason


@pytest.mark.parametrize("family", ONE_DOCUMENT)
def test_a_family_that_cannot_be_packed_gets_one_document_a_forward(family: str) -> None:
    verdict = examine(ONE_DOCUMENT[family])
    assert verdict.mode == "OneDocument"
    assert verdict.patches == WITHOUT_PACKING
    assert verdict.reason


def test_a_wrong_patch_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that swallows the window: silently wrong in training, seen on the twin."""
    right = attention.packed_attention
    monkeypatch.setattr(
        patches, "packed_attention", lambda *given, **named: right(*given, **named | {"sliding_window": None})
    )
    verdict = examine(EVERY_PATCH["mistral"])
    assert (verdict.mode, verdict.patches) == ("OneDocument", WITHOUT_PACKING)
    assert "gradients differ by" in verdict.reason


def test_a_patch_that_raises_is_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(patches._LoraLinear, "apply", broken)
    verdict = examine(EVERY_PATCH["llama"])
    assert verdict.patches == [name for name in patches.ALL if name != patches.LORA_LINEAR]
    assert "lora-linear left out: RuntimeError: no such kernel" in verdict.reason


def test_the_verdict_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    first = verify.verify(folder, tmp_path / "verify")
    monkeypatch.setattr(verify, "_examine", None)
    assert verify.verify(folder, tmp_path / "verify") == first


def test_attention_refuses_what_it_does_not_know() -> None:
    q = torch.randn(1, 2, 4, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="new_idea"):
        attention.packed_attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=cu, new_idea=1.0)


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


# -- the model -------------------------------------------------------------------------------------------------------


def test_targets_are_the_decoders_linears_without_router_and_head() -> None:
    config = verify.shrink(transformers.Qwen3MoeConfig())
    targets = target_linears(transformers.Qwen3MoeForCausalLM(config))
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(targets)
    assert not {"gate", "lm_head"} & set(targets)


@pytest.mark.parametrize("name", ["NoSuchForCausalLM", "LlamaForSequenceClassification"])
def test_what_is_no_causal_language_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelUnsupportedError, match=name):
        model_class({"architectures": [name]})


def test_the_base_is_frozen_and_in_float32_on_a_cpu(tmp_path: Path) -> None:
    base = load_base(make_model(tmp_path / "model"), torch.device("cpu"))
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in base.parameters())
