"""A base model that also sees is served by the class that its config names, with adapters of its decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.serving.tiny import make_model
from transformers import DynamicCache, Mistral3Config, Mistral3ForConditionalGeneration

from tuneward_serving.agent.adapter_check import Limits, base_shapes, check_structure
from tuneward_serving.agent.weights import read_model_header
from tuneward_serving.engine.generation import BASE
from tuneward_serving.engine.runner import Runner, load_runner

IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with the tokenizer of the other tests."""
    folder = make_model(tmp_path_factory.mktemp("seeing"))
    text = {
        "model_type": "mistral", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.4,
    }  # fmt: skip
    eyes = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eyes)).save_pretrained(folder)
    return folder


def answers(runner: Runner, slot: str) -> torch.Tensor:
    ids = torch.tensor([IDS])
    mask, positions = torch.ones_like(ids), torch.arange(len(IDS))[None]
    return runner.forward(ids, mask=mask, positions=positions, cache=DynamicCache(), slots=[slot], keep=0)


def test_an_adapter_of_the_decoder_fits_and_is_served(seeing: Path, tmp_path: Path) -> None:
    plain = Mistral3ForConditionalGeneration.from_pretrained(seeing, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], exclude_modules=r"model\.vision_tower(\..*)?", init_lora_weights=False
    )
    tuned = get_peft_model(plain, config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor([IDS])).logits
        with tuned.disable_adapter():
            before = tuned(input_ids=torch.tensor([IDS])).logits
    check_structure(tmp_path / "adapter", base_shapes(read_model_header(seeing)), Limits(max_adapters=1, max_rank=8))
    runner = load_runner(seeing)
    torch.testing.assert_close(answers(runner, BASE), before, atol=1e-4, rtol=0)
    runner.load("s0", tmp_path / "adapter")
    torch.testing.assert_close(answers(runner, "s0"), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(answers(runner, BASE), before, atol=1e-4, rtol=0)
    assert not torch.allclose(expected, before, atol=1e-2)
