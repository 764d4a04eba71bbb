"""Answers that are written together are those that are written alone, or they are written alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.trainer.families import ONE_DOCUMENT, PACKED, served_class

from tuneward_trainer import verify
from tuneward_trainer.writing import TOGETHER, Writer

CPU = torch.device("cpu")
PROMPTS = [[3 + (7 * row + place) % 90 for place in range(length)] for row, length in enumerate((29, 3, 40, 11, 1))]
FAMILIES = ["mistral, window", "gemma2", "gpt_oss", "deepseek_v3", "lfm2", "bloom", "qwen3_5_text"]


def model_of(name: str) -> Any:
    config = (PACKED | ONE_DOCUMENT)[name]
    torch.manual_seed(3)
    return verify.whole_twin(served_class(config), config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_together_is_what_is_written_alone(name: str) -> None:
    writer = Writer(model_of(name), CPU, {5}, 12)
    assert writer.is_right_together(PROMPTS)
    assert writer.write(PROMPTS) == [writer.write([prompt])[0] for prompt in PROMPTS]


class _Blind(torch.nn.Module):
    """A model that does not look at the mask, as one with a state of its own may do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def generate(self, *, attention_mask: torch.Tensor, **named: Any) -> Any:
        return self.model.generate(attention_mask=torch.ones_like(attention_mask), **named)


def test_a_model_that_sees_padding_is_found_out() -> None:
    writer = Writer(_Blind(model_of("llama")), CPU, {5}, 12)
    assert not writer.is_right_together(PROMPTS)
    assert writer.is_right_together([PROMPTS[0], PROMPTS[0]]), "nothing is padded"


class _Refusing(torch.nn.Module):
    def generate(self, **_: Any) -> Any:
        raise ValueError("one row only")


def test_a_model_that_takes_one_row_only_is_asked_so() -> None:
    assert not Writer(_Refusing(), CPU, {5}, 12).is_right_together(PROMPTS)


def test_batches_hold_prompts_of_about_the_same_length() -> None:
    writer = Writer(None, CPU, {5}, 12)
    assert writer.batches([[1] * length for length in (4, 1, 3, 1)]) == [[1, 3, 2, 0]]
    assert [len(batch) for batch in writer.batches([[1]] * (2 * TOGETHER + 1))] == [TOGETHER, TOGETHER, 1]
    assert writer.batches([[1] * 20_000, [1] * 20_000]) == [[0], [1]]
