"""Configs of many model families, as transformers makes them, with the class that is trained and served."""

from __future__ import annotations

from typing import Final

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import verify

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 48, "long_factor": [2.0] * 48}

PACKED: Final[dict[str, PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig(),
    "llama, tied": transformers.LlamaConfig(tie_word_embeddings=True),
    "llama3 rope": transformers.LlamaConfig(rope_parameters=_LLAMA3_ROPE),
    "mistral": transformers.MistralConfig(sliding_window=None),
    "mistral, window": transformers.MistralConfig(sliding_window=4096),
    "ministral3": transformers.Ministral3Config(),
    "mistral3": transformers.Mistral3Config(),
    "mistral4": transformers.Mistral4Config(),
    "mixtral": transformers.MixtralConfig(),
    "qwen2": transformers.Qwen2Config(),
    "qwen3": transformers.Qwen3Config(),
    "qwen3_moe": transformers.Qwen3MoeConfig(),
    "qwen3_vl": transformers.Qwen3VLConfig(),
    "gemma": transformers.GemmaConfig(),
    "gemma2": transformers.Gemma2Config(),
    "gemma3_text": transformers.Gemma3TextConfig(),
    "gemma3": transformers.Gemma3Config(),
    "gemma4_text": transformers.Gemma4TextConfig(),
    "gemma4_text, shared keys": transformers.Gemma4TextConfig(num_kv_shared_layers=10),
    "gemma4": transformers.Gemma4Config(),
    "phi": transformers.PhiConfig(),
    "phi3": transformers.Phi3Config(),
    "phi3, long rope": transformers.Phi3Config(rope_parameters=_LONG_ROPE, original_max_position_embeddings=4096),
    "olmo2": transformers.Olmo2Config(),
    "olmo3": transformers.Olmo3Config(),
    "smollm3": transformers.SmolLM3Config(),
    "granite": transformers.GraniteConfig(logits_scaling=3.0),
    "cohere": transformers.CohereConfig(),
    "cohere2": transformers.Cohere2Config(),
    "gpt_oss": transformers.GptOssConfig(),
    "gpt_neox": transformers.GPTNeoXConfig(),
    "glm": transformers.GlmConfig(),
    "glm4": transformers.Glm4Config(),
    "glm4_moe": transformers.Glm4MoeConfig(),
    "deepseek_v3": transformers.DeepseekV3Config(),
    "falcon": transformers.FalconConfig(),
    "gptj": transformers.GPTJConfig(),
    "starcoder2": transformers.Starcoder2Config(),
}
"""Right with every patch."""

ONE_DOCUMENT: Final[dict[str, PreTrainedConfig]] = {
    # Its distance bias is no argument of attention.
    "bloom": transformers.BloomConfig(),
    # It does not pass the bounds down.
    "stablelm": transformers.StableLmConfig(),
    # Their recurrent state knows no bounds, unless a package for GPUs is there.
    "qwen3_5": transformers.Qwen3_5Config(),
    "qwen3_5_text": transformers.Qwen3_5TextConfig(),
    "qwen3_next": transformers.Qwen3NextConfig(),
    # Nor does this state, or the convolution before it, and nobody says so.
    "lfm2": transformers.Lfm2Config(layer_types=["conv", "full_attention"] * 16),
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(),
    "falcon_mamba": transformers.FalconMambaConfig(),
    "falcon_h1": transformers.FalconH1Config(),
}
"""Right with every patch but packing."""

READS_BOTH_WAYS: Final[dict[str, PreTrainedConfig]] = {
    "bert": transformers.BertConfig(),
    "electra": transformers.ElectraConfig(),
}
"""Encoders, under a head that writes."""


def served_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Of a checkpoint of this family: with eyes where the family has them."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found: type[PreTrainedModel] = getattr(transformers, names[config.model_type])
    return found


def examine(config: PreTrainedConfig) -> ResolvedPacking:
    return verify._examine(served_class(config), config)
