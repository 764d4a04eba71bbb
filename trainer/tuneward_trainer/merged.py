"""An adapter added to its base model's weights: a model for engines that load no adapters, or not of its kind, as vLLM loads
no DoRA.

Weights are added in float32 and rounded once, to the base model's dtype. The adapter's proof is then computed again from
what is rounded: a merge that lost what was learnt, or another base model, is told and leaves nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from tuneward_api import manifest
from tuneward_api.files import Proof, proof_tolerance
from tuneward_api.names import ExitCode
from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import endings, parent, whole
from tuneward_trainer.model import add_adapters, load_base
from tuneward_trainer.proof import logprobs

_PARTIAL: Final = ".partial"


class MergeError(Exception):
    """No model came of it; one sentence."""


def main(adapter: Path, base: Path, folder: Path) -> int:
    """The command."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        error = merge(adapter, base, folder)
    except MergeError as refused:
        sys.stderr.write(f"{refused}\n")
        return ExitCode.INPUT_MISSING
    sys.stdout.write(f"{folder} holds the model; the proof's log-probabilities differ by {error:.2g} at most\n")
    return ExitCode.OK


def merge(adapter: Path, base: Path, folder: Path) -> float:
    """Writes into `folder`, which must not be there. Returns the largest difference from the proof, in nats. Raises
    MergeError."""
    proof = _read(adapter)
    if not (base / "config.json").is_file():
        raise MergeError(f"{base} is no model folder: it must hold config.json and *.safetensors")
    if folder.exists():
        raise MergeError(f"{folder} is there already; name another folder, or remove it")
    model = _merged(adapter, base)
    dtype = whole.dtype_of(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype).float()
    error = max(_distance(logprobs(model, text.ids), text.tuned) for text in proof.texts)
    allowed = max(proof.tolerance, proof_tolerance(str(dtype).removeprefix("torch.")))
    if not error <= allowed:
        raise MergeError(
            f"{adapter} on {base} gives log-probabilities that are {error:.2g} from its proof's, {allowed:.2g} at most are "
            "allowed; take the base model that it was trained on"
        )
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in _tensors(model).items()}
    try:
        whole.write(model, state, partial, base)
        manifest.write_manifest(partial)
        partial.rename(folder)
    except (OSError, SafetensorError) as failed:
        shutil.rmtree(partial, ignore_errors=True)
        raise MergeError(f"{folder} could not be written: {failed}; make room there, or name another folder") from failed
    return error


def _read(adapter: Path) -> Proof:
    try:
        manifest.verify(adapter)
        json.loads((adapter / "adapter/adapter_config.json").read_bytes())
        return Proof.model_validate_json((adapter / "proof.json").read_bytes())
    except (manifest.ManifestError, OSError, ValueError) as error:
        raise MergeError(
            f"{adapter} is no adapter as tuneward files it, with adapter/, proof.json and MANIFEST.json: {error}"
        ) from error


def _merged(adapter: Path, base: Path) -> PreTrainedModel:
    try:
        model = load_base(base, torch.device("cpu"))
        method = ResolvedMethod.model_validate(parent.shape(adapter) | {"dropout": 0.0, "trainableParameters": 0})
        parent.set_state(add_adapters(model, method, seed=0, base_uri=""), adapter, str(adapter))
    except (OSError, ValueError, endings.EndingError) as error:
        raise MergeError(f"{adapter} does not go on {base}: {' '.join(str(error).split())[:300]}") from error
    parent.merge(model)
    return model


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights that are one and the same come once."""
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    return {name: tensor.detach() for name, tensor in (dict(model.named_parameters()) | buffers).items()}


def _distance(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))
