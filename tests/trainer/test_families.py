"""Many families of models: each is right with packed rows, or one document at a time, or refused with a sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.trainer.families import ONE_DOCUMENT, PACKED, READS_BOTH_WAYS, examine, served_class
from tests.trainer.jobs import make_model, tiny_config
from tests.trainer.quantised import to_fp8, to_mxfp4

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import patches, verify
from tuneward_trainer.facts import examine as facts_of
from tuneward_trainer.model import (
    ModelUnsupportedError,
    add_adapters,
    load_base,
    model_class,
    target_linears,
    trainable,
)
from tuneward_trainer.report import EndError

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
IN_DOUBLES = [
    *("llama", "llama, tied", "llama3 rope", "mistral", "mistral, window", "ministral3", "qwen2", "qwen3", "gemma"),
    *("gemma2", "gemma3_text", "gemma4_text", "phi3", "olmo2", "smollm3", "granite", "glm", "cohere2", "falcon"),
]
"""No mixture: torch multiplies experts in float32 at most."""


@pytest.mark.parametrize("family", PACKED)
def test_every_patch_agrees_with_the_plain_model(family: str) -> None:
    verdict = examine(PACKED[family])
    assert (verdict.mode, verdict.patches) == ("Packed", list(patches.ALL)), verdict.reason


@pytest.mark.parametrize("family", IN_DOUBLES)
def test_patched_gradients_are_those_of_float64(family: str) -> None:
    """Of all documents in one row, against the plain model on each alone: nothing but float32's own rounding is between."""
    config = PACKED[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = verify.twin(served_class(config), config)
        found = {name: gradient.double() for name, gradient in verify.gradients(model, patches.ALL).items()}
        worst, where = verify.worst_error(found, verify.gradients(model.double(), None))
    assert worst < 5e-6, where


@pytest.mark.parametrize("family", ONE_DOCUMENT)
def test_a_family_that_cannot_be_packed_gets_one_document_a_forward(family: str) -> None:
    verdict = examine(ONE_DOCUMENT[family])
    assert verdict.mode == "OneDocument"
    assert verdict.patches == [name for name in patches.ALL if name != patches.PACKED_ATTENTION]
    assert verdict.reason


@pytest.mark.parametrize("family", READS_BOTH_WAYS)
def test_a_model_that_reads_both_ways_is_refused(family: str) -> None:
    """Its class is in the list of those that write, and each token would have seen what it is to say."""
    with pytest.raises(
        ModelUnsupportedError, match=r"ends with its last target .*; use a model that reads from left to right"
    ):
        examine(READS_BOTH_WAYS[family])


@pytest.mark.parametrize("family", ["phi3, long rope", "ministral3"])
def test_a_row_of_longer_documents_than_at_first_changes_no_other(family: str, tmp_path: Path) -> None:
    """longrope takes the frequencies of a row by the longest document in it; Ministral's scale is one of each token."""
    config = copy.deepcopy(PACKED[family])
    config.architectures = [served_class(config).__name__]
    config.save_pretrained(tmp_path)
    first = config.rope_parameters["original_max_position_embeddings"]
    mode = "OneDocument" if family.startswith("phi3") else "Packed"
    assert verify.verify(tmp_path, longest=first).mode == "Packed"
    assert verify.verify(tmp_path, longest=first + 1).mode == mode


def test_a_layer_that_peft_takes_no_adapter_on_is_refused() -> None:
    with pytest.raises(ModelUnsupportedError, match=r"PEFT puts no adapter on all of \['0', .*; use another model"):
        examine(transformers.CTRLConfig())


# -- what LoRA is put on ---------------------------------------------------------------------------------------------


def adapted(family: str) -> set[str]:
    """Names of what is trained in the family's twin, without `lora_A.default.weight`."""
    model = verify.twin(served_class(PACKED[family]), PACKED[family])
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trainable(model)}


@pytest.mark.parametrize("family", ["mistral3", "gemma3", "gemma4", "qwen3_vl"])
def test_nothing_that_sees_is_adapted(family: str) -> None:
    names = adapted(family)
    assert {name.rsplit(".", 1)[-1] for name in names} >= ATTENTION
    assert all(name.startswith("model.language_model.") for name in names), names


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_of_a_mixture_neither_router_nor_fused_experts_are_adapted(family: str) -> None:
    names = adapted(family)
    assert names
    assert all(".self_attn." in name for name in names), names


def test_targets_are_the_decoders_linears_without_router_and_head() -> None:
    config = verify.shrink(transformers.Qwen3MoeConfig())
    targets = target_linears(transformers.Qwen3MoeForCausalLM(config))
    assert set(targets) >= ATTENTION
    assert not {"gate", "lm_head"} & set(targets)


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NoSuchForCausalLM", "LlamaForSequenceClassification"])
def test_what_writes_no_text_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelUnsupportedError, match=name):
        model_class({"architectures": [name]})


def test_the_base_is_frozen_and_in_float32_on_a_cpu(tmp_path: Path) -> None:
    base = load_base(make_model(tmp_path / "model"), torch.device("cpu"))
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("block", [None, 16])
def test_an_fp8_base_is_unpacked_while_it_is_loaded(tmp_path: Path, block: int | None) -> None:
    folder = make_model(tmp_path / "model")
    worth = to_fp8(folder, block=block)
    base = load_base(folder, torch.device("cpu"))
    loaded = base.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    for name, weight in worth.items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-6, atol=0)
    assert facts_of(folder).parameters == sum(parameter.numel() for parameter in base.parameters())
    assert verify.verify(folder, tmp_path / "verify").mode == "Packed"


def test_an_mxfp4_base_is_unpacked_while_it_is_loaded(tmp_path: Path) -> None:
    """As gpt-oss ships its experts; the rest of it are plain numbers."""
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, architectures=["GptOssForCausalLM"],
        pad_token_id=2, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    folder = make_model(tmp_path / "model", config)
    worth = to_mxfp4(folder)
    base = load_base(folder, torch.device("cpu"))
    loaded = base.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert loaded.keys() == worth.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in worth.items())
    assert facts_of(folder).parameters == sum(parameter.numel() for parameter in base.parameters())
    assert verify.verify(folder, tmp_path / "verify").mode == "Packed"


def test_another_way_of_packing_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(EndError, match=r"quantised \(gptq\); use the same model in bf16 or fp32, or in fp8 or mxfp4"):
        facts_of(folder)


def mistral3(folder: Path) -> Path:
    """A tiny one that sees, saved as its checkpoints are: the decoder's names begin with language_model there."""
    text = tiny_config(tie_word_embeddings=False).to_dict() | {"model_type": "mistral", "architectures": None}
    eyes = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=eyes, architectures=["Mistral3ForConditionalGeneration"]
    )
    return make_model(folder, config)


def test_the_class_that_sees_is_trained_and_its_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    folder = mistral3(tmp_path / "model")
    base = load_base(folder, torch.device("cpu"))
    assert type(base).__name__ == "Mistral3ForConditionalGeneration"
    method = ResolvedMethod(
        type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=target_linears(base),
        trainable_parameters=0,
    )  # fmt: skip
    model = add_adapters(base, method, seed=0, base_uri="")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_base(folder, torch.device("cpu")), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(logits(model, ids), logits(again, ids))
    assert not torch.equal(logits(model, ids), logits(load_base(folder, torch.device("cpu")), ids))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found
