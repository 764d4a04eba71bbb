"""A fully fine-tuned model as a model of its own: what any engine loads, and the proof beside it.

    model/a<attempt>/model/config.json, tokenizer, chat template, model*.safetensors, …
    model/a<attempt>/proof.json
    model/a<attempt>/MANIFEST.json

Weights have the base model's dtype and names; all else that its folder holds is copied. The proof says, as an adapter's
does, what the model that the job started from and this one give a few texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuneward_api import manifest
from tuneward_api.files import Proof, ProofText, canonical_json, proof_tolerance
from tuneward_trainer.batch import Sample
from tuneward_trainer.model import read_config
from tuneward_trainer.proof import logprobs, texts

LARGEST_FILE: Final = "5GB"
_REPLACED: Final = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_OURS: Final = ("config.json", manifest.MANIFEST, "source.json")


def answers(model: torch.nn.Module, samples: Sequence[Sample]) -> list[ProofText]:
    """What a model says now of the proof's texts. A collective, where ranks hold it together."""
    return [ProofText(ids=ids, base=found, tuned=found) for ids in texts(samples) for found in [logprobs(model, ids)]]


def export(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    folder: Path,
    source: Path,
    *,
    before: list[ProofText],
    after: list[ProofText],
) -> str:
    """Writes the model with the tensors `state`, its proof and the manifest into `folder`; `source` is the base model's.
    Returns the manifest's digest."""
    dtype = write(model, state, folder / "model", source)
    both = [ProofText(ids=one.ids, base=one.base, tuned=two.tuned) for one, two in zip(before, after, strict=True)]
    made = Proof(texts=both, dtype=dtype, tolerance=proof_tolerance(dtype))
    (folder / "proof.json").write_text(canonical_json(made.to_json()) + "\n")
    return manifest.write_manifest(folder)


def write(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, source: Path) -> str:
    """The model with the tensors `state`, and all else that the base model's folder `source` holds. Returns the name of its
    dtype."""
    model.save_pretrained(folder, state_dict=state, max_shard_size=LARGEST_FILE)
    dtype = str(dtype_of(model)).removeprefix("torch.")
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_REPLACED) and file.name not in _OURS:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(_config(source, dtype), indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*.safetensors"):
        # safetensors lets the owner alone read what it writes.
        shutil.copymode(folder / "config.json", file)
    return dtype


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """That the base model's config names, which it is served in."""
    named = model.config.get_text_config().dtype or model.config.dtype
    return getattr(torch, named) if isinstance(named, str) else named or torch.float32


def _config(source: Path, dtype: str) -> dict[str, Any]:
    """The base model's own, but for how its weights were packed."""
    config = read_config(source)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    return {**config, "dtype": dtype}
