"""The estimate against the model that it estimates."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from tuneward_api.estimate import Data, flops_per_token
from tuneward_api.shape import Shape

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), MistralConfig(**SIZES, head_dim=32), Qwen3Config(**SIZES, head_dim=16)],
    ids=lambda config: str(config.model_type),
)
def test_the_shape_counts_the_models_own_weights(config: PreTrainedConfig) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config.to_dict())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert shape.layers * (shape.attention + shape.mlp) == sum(linear.weight.numel() for linear in linears)
    assert shape.lora(8) == 8 * sum(linear.in_features + linear.out_features for linear in linears)


def test_flops_are_six_a_trained_weight_and_four_a_frozen_one() -> None:
    shape = Shape.of({**SIZES, "tie_word_embeddings": True})
    nothing = flops_per_token(shape, Data(learnt=0, length=0), rank=0)
    # The first layer's queries, keys and values need no gradient of their input.
    first = 2 * 64 * (64 + 2 * 32)
    assert nothing == 4 * 3 * (shape.attention + shape.mlp) - first
    assert flops_per_token(shape, Data(learnt=0, length=0), rank=8) - nothing == 6 * shape.lora(8)
    assert flops_per_token(shape, Data(learnt=1, length=0), rank=0) - nothing == 4 * 128 * 64
    assert flops_per_token(shape, Data(learnt=0, length=10), rank=0) - nothing == 7 * 64 * 3 * 10


def test_a_config_without_its_numbers_names_the_missing_one() -> None:
    with pytest.raises(ValueError, match=r"config.json has no hidden_size"):
        Shape.of({"num_attention_heads": 4})
