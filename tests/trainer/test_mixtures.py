"""Mixtures of experts: attention, shared experts and dense layers learn, and whoever loads the adapter has it there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tests.trainer.families import PACKED, served_class
from tests.trainer.jobs import VOCABULARY, filed, make_job, train
from tests.trainer.test_families import ATTENTION, logits
from tests.trainer.test_methods import answers
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from tuneward_api import manifest
from tuneward_api.adapters import targets_of
from tuneward_api.files import Parent, Proof
from tuneward_api.finetunejob import Method
from tuneward_api.resolved import ResolvedMethod
from tuneward_api.shape import Shape
from tuneward_serving.agent import adapter_check
from tuneward_serving.agent.adapter_check import Limits
from tuneward_serving.agent.proof import judge
from tuneward_serving.agent.weights import read_model_header
from tuneward_serving.engine.generation import BASE
from tuneward_serving.engine.runner import Runner
from tuneward_trainer import defaults, parent, patches, prepare, verify
from tuneward_trainer.facts import Facts
from tuneward_trainer.model import (
    adapted_share,
    adapter_parameters,
    add_adapters,
    build_empty,
    linears,
    target_linears,
    trainable,
)
from tuneward_trainer.proof import save_adapter
from tuneward_trainer.report import EndError

MLP = {"gate_proj", "up_proj", "down_proj"}
MIXTURES: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "deepseek_v3": (PACKED["deepseek_v3"], {"mlp", "shared_experts"}),
    "glm4_moe": (PACKED["glm4_moe"], {"mlp", "shared_experts"}),
    "ernie4_5_moe": (transformers.Ernie4_5_MoeConfig(), {"mlp", "shared_experts"}),
    "hunyuan_v1_moe": (transformers.HunYuanMoEV1Config(head_dim=16), {"shared_mlp"}),
    "qwen3_next": (transformers.Qwen3NextConfig(), {"shared_expert"}),
    "qwen2_moe": (transformers.Qwen2MoeConfig(), {"shared_expert"}),
}
"""Family -> its config, and what bears the names that experts once had."""
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def base_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = served_class(config)(verify.shrink(config))
    model.requires_grad_(False)
    return model.eval()


def method_of(model: nn.Module, **changes: Any) -> ResolvedMethod:
    values: dict[str, Any] = {
        "type": "LoRA", "rank": 4, "alpha": 8.0, "dropout": 0.0, "rs_lora": False,
        "target_modules": target_linears(model), "trainable_parameters": 0,
    }  # fmt: skip
    return ResolvedMethod(**values | changes)


def tuned(config: PreTrainedConfig, folder: Path, seed: int = 1, **changes: Any) -> PeftModel:
    """With an adapter that is not at its beginning, saved into `folder`."""
    base = base_of(config)
    model = add_adapters(base, method_of(base, **changes), seed=0, base_uri="")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.1)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_plain_peft_has_the_adapter_where_it_was_trained(family: str, tmp_path: Path) -> None:
    config, owners = MIXTURES[family]
    model = tuned(config, tmp_path)
    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trainable(model)}
    assert {name.split(".")[-2] for name in names if name.split(".")[-1] in MLP} == owners
    assert not [name for name in names if {"gate", "experts", "shared_expert_gate"} & set(name.split("."))]
    again = PeftModel.from_pretrained(base_of(config), tmp_path)
    found = logits(model, IDS)
    torch.testing.assert_close(logits(again, IDS), found, atol=2e-6, rtol=0)
    with model.disable_adapter():
        assert (logits(model, IDS) - found).abs().max() > 0.1
    assert targets_of(json.loads((tmp_path / "adapter_config.json").read_text())) == target_linears(base_of(config))


def test_a_step_changes_the_adapters_of_shared_experts(tmp_path: Path) -> None:
    model = tuned(PACKED["glm4_moe"], tmp_path)
    gradients = verify.gradients(model, patches.ALL)
    assert gradients.keys() == trainable(model).keys()
    shared = [value for name, value in gradients.items() if ".shared_experts." in name or ".mlp.up_proj." in name]
    assert shared
    assert all(bool(value.any()) for value in shared)
    assert all(patches.fits_lora_linear(module) for module in model.modules() if hasattr(module, "lora_A"))
    assert any(patches.fits_gated_mlp(module) for name, module in model.named_modules() if name.endswith("shared_experts"))


def test_what_dropout_did_is_no_matter_to_whoever_loads_it(tmp_path: Path) -> None:
    """PEFT refuses dropout beside target_parameters, in a file that is loaded too."""
    config = PACKED["glm4_moe"]
    model = tuned(config, tmp_path, dropout=0.1)
    assert sum(isinstance(module, nn.Dropout) and module.p == 0.1 for module in model.modules()) > 0
    again = PeftModel.from_pretrained(base_of(config), tmp_path)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), atol=2e-6, rtol=0)


def facts_of(config: PreTrainedConfig) -> Facts:
    empty = build_empty(config, served_class(config))
    return Facts(architecture="", model_type=config.model_type, parameters=0, max_length=None, empty=empty)


@pytest.mark.parametrize(
    ("names", "owners"),
    [
        (["shared_experts.gate_proj", "q_proj"], {"shared_experts", "self_attn"}),
        (["up_proj"], {"shared_experts", "mlp"}),
        (["mlp.down_proj"], {"mlp"}),
    ],
)
def test_a_job_may_name_them_and_the_next_goes_on_with_the_same(names: list[str], owners: set[str], tmp_path: Path) -> None:
    config = verify.shrink(PACKED["glm4_moe"])
    facts = facts_of(config)
    asked = Method.model_validate({"rank": 4, "alpha": 8, "targetModules": names})
    method = defaults.method(asked, facts)
    assert method.target_modules == sorted(names)
    model = tuned(PACKED["glm4_moe"], tmp_path / "adapter", target_modules=method.target_modules)
    assert {name.split(".lora_")[0].split(".")[-2] for name in trainable(model)} == owners
    assert method.trainable_parameters == sum(parameter.numel() for parameter in trainable(model).values())
    assert parent.method(asked, tmp_path, facts, "x") == method
    again = PeftModel.from_pretrained(base_of(PACKED["glm4_moe"]), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), atol=2e-6, rtol=0)


def test_going_on_begins_with_what_was_saved(tmp_path: Path) -> None:
    config = PACKED["deepseek_v3"]
    model = tuned(config, tmp_path / "parent/adapter")
    record = Parent(
        name="x", base_uri="", base_digest="", artifact_uri="", artifact_digest=manifest.write_manifest(tmp_path / "parent")
    )
    base = base_of(config)
    again = add_adapters(base, method_of(base), seed=5, base_uri="")
    parent.load(again, record, tmp_path)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_dora_is_on_the_attention_alone_since_peft_loads_it_nowhere_else() -> None:
    facts = facts_of(verify.shrink(PACKED["glm4_moe"]))
    found = defaults.method(Method.model_validate({"type": "DoRA"}), facts)
    assert found.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(EndError) as caught:
        defaults.method(Method.model_validate({"type": "DoRA", "targetModules": ["shared_experts.up_proj"]}), facts)
    assert caught.value.message == (
        "spec.method.targetModules holds 'shared_experts.up_proj'; with DoRA, allowed for this model: k_proj, o_proj, q_proj, "
        "v_proj"
    )


@pytest.mark.parametrize(
    ("family", "name", "mlp"),
    # In the last one what sees has layers of these names too, and PEFT excludes no parameters.
    [("qwen3_moe", "up_proj", False), ("mixtral", "w1", False), ("glm4_moe", "gate", True), ("glm4v_moe", "up_proj", False)],
)
def test_what_no_adapter_can_be_on_is_refused_with_what_is_allowed(family: str, name: str, mlp: bool) -> None:
    config = verify.shrink(PACKED[family] if family in PACKED else transformers.Glm4vMoeConfig())
    with pytest.raises(EndError) as caught:
        defaults.method(Method.model_validate({"targetModules": [name]}), facts_of(config))
    allowed = ", ".join(sorted(ATTENTION | (MLP if mlp else set())))
    assert caught.value.message == f"spec.method.targetModules holds {name!r}; allowed for this model: {allowed}"


def test_the_share_of_the_weights_that_a_token_passes_through_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral 8x7B: two of eight experts see a token; its attention is a tenth of what does."""
    attention, experts = 4096 * (2 * 4096 + 2 * 1024), 2 * 3 * 4096 * 14336 + 8 * 4096
    mixtral = facts_of(transformers.MixtralConfig(num_hidden_layers=2)).empty
    assert adapted_share(mixtral, target_linears(mixtral)) == pytest.approx(attention / (attention + experts))
    # A dense layer, then one of 128 experts, of which a token passes through 8, and of a shared one.
    config = transformers.Glm4MoeConfig(num_hidden_layers=2)
    glm, hidden, expert = facts_of(config).empty, config.hidden_size, 3 * config.hidden_size * config.moe_intermediate_size
    adapted = sum(layer.weight.numel() for layer in linears(glm).values())
    assert adapted > 3 * hidden * config.intermediate_size + expert
    assert adapted_share(glm, target_linears(glm)) == pytest.approx(adapted / (adapted + 8 * expert + 128 * hidden))
    with caplog.at_level(logging.INFO):
        prepare.say_share(facts_of(transformers.MixtralConfig(num_hidden_layers=2)), target_linears(mixtral))
        prepare.say_share(facts_of(transformers.LlamaConfig(num_hidden_layers=1)), ["q_proj"])
    said = "adapters are on 10.6% of the weights that a token passes through; routed experts have none"
    assert [record.getMessage() for record in caplog.records if record.name == prepare.__name__] == [said]


def test_rows_of_different_adapters_are_served_together(tmp_path: Path) -> None:
    config = PACKED["glm4_moe"]
    base_of(config).save_pretrained(tmp_path / "base")
    sets = [["shared_experts.up_proj", "q_proj"], target_linears(base_of(config)), ["v_proj"]]
    models = [tuned(config, tmp_path / f"s{i}", i, target_modules=targets) for i, targets in enumerate(sets)]
    shapes = adapter_check.base_shapes(read_model_header(tmp_path / "base"))
    runner = Runner(base_of(config), SimpleNamespace(eos_token_id=1))
    for index in range(len(sets)):
        adapter_check.check_structure(tmp_path / f"s{index}", shapes, Limits(max_adapters=3, max_rank=4))
        runner.load(f"s{index}", tmp_path / f"s{index}")
    rows, width = len(sets) + 1, IDS.shape[1]
    found = runner.forward(
        IDS.repeat(rows, 1),
        mask=torch.ones((rows, width), dtype=torch.long),
        positions=torch.arange(width)[None].repeat(rows, 1),
        cache=DynamicCache(),
        slots=["s0", "s1", "s2", BASE],
        keep=0,
    )
    expected = [*(logits(model, IDS)[0] for model in models), logits(base_of(config), IDS)[0]]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    runner.unload("s1")


def test_the_shape_counts_them() -> None:
    config = transformers.Glm4MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    facts, shape = facts_of(config), Shape.of(config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in facts.empty.parameters())
    targets = target_linears(facts.empty)
    assert shape.lora(4, set(targets)) == adapter_parameters(facts.empty, targets, 4)


def test_a_job_ends_in_a_model_that_answers(tmp_path: Path) -> None:
    """QLoRA: trained on packed weights, proved on the plain ones, filed under the names that a job has, served."""
    config = verify.shrink(PACKED["glm4_moe"])
    config.architectures, config.vocab_size = ["Glm4MoeForCausalLM"], VOCABULARY
    targets = target_linears(served_class(config)(config))
    job = train(make_job(tmp_path, config=config, method={"type": "QLoRA", "target_modules": targets}, hyper={"steps": 4}))
    adapter = filed(job)
    assert adapter.target_modules == targets
    folder, model = tmp_path / adapter.sub_path, tmp_path / "models/tiny"
    learnt = load_file(folder / "adapter/adapter_model.safetensors")
    assert all(value.any() for name, value in learnt.items() if ".mlp." in name)
    runner = Runner(
        served_class(config).from_pretrained(model, dtype=torch.float32).eval(), SimpleNamespace(eos_token_id=None)
    )
    runner.load("a0", folder / "adapter")
    proof = Proof.model_validate_json((folder / "proof.json").read_bytes())
    judge(proof.model_copy(update={"tolerance": 1e-4}), [answers(runner, text.ids) for text in proof.texts])
