"""Whether an adapter's files are what the wanted list says and fit the base model, told without an engine.

Everything here is cheap next to loading, and an engine's own refusal would come as an exception's text: so the
agent looks first, and says in one sentence what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneward_api.conditions import Reason
from tuneward_api.files import Proof, WantedAdapter
from tuneward_api.manifest import MANIFEST, ManifestError, verify
from tuneward_serving.agent.weights import Tensor, WeightsError, is_finite, is_zero, read_header

PROOF = "proof.json"
ADAPTER_DIR = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")
_MAGNITUDE = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(?:\.weight)?$")
"""DoRA's: the length of each row of the tuned weight, [out]."""


class Refused(Exception):  # noqa: N818 - it is a verdict, not a mishap
    """Why an adapter is not ready: one word and one sentence."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine was started with."""

    max_adapters: int
    max_rank: int


Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor of the base model, from its layers on -> its shape."""


def base_shapes(header: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {_from_layers_on(name): tensor.shape for name, tensor in header.items()}


def _from_layers_on(name: str) -> str:
    """What models that also see call `language_model.model.layers.0` in their files is `model.language_model.layers.0`
    once loaded, and in the adapter; their other parts have a first name that no decoder has."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part not in ("model", "language_model")), 0)
    return ".".join(parts[first:])


def check_files(folder: Path, wanted: WantedAdapter) -> Proof:
    """Reads every byte of the finished adapter; returns its proof."""
    if not (folder / MANIFEST).is_file():
        raise Refused(Reason.ARTIFACT_MISSING, f"{wanted.path} is not (or not completely) in the store's adapters folder")
    try:
        verify(folder, digest=wanted.digest)
    except ManifestError as error:
        raise Refused(Reason.DIGEST_MISMATCH, str(error)) from error
    try:
        return Proof.model_validate_json((folder / PROOF).read_bytes())
    except FileNotFoundError as error:
        raise Refused(Reason.ARTIFACT_MISSING, f"{wanted.path} holds no {PROOF}; it cannot be proved") from error
    except ValueError as error:
        raise Refused(Reason.PROOF_FAILED, f"{wanted.path}/{PROOF} cannot be read: {_first_line(error)}") from error


def check_structure(folder: Path, shapes: Shapes, limits: Limits) -> None:
    """`folder` holds PEFT's two files. Raises Refused at the first thing that does not fit."""
    config = _read_config(folder)
    try:
        header = read_header(folder / WEIGHTS)
    except WeightsError as error:
        raise Refused(Reason.STRUCTURE_MISMATCH, str(error)) from error
    _check_rank(config, limits)
    lengths = {match["module"]: tensor for name, tensor in header.items() if (match := _MAGNITUDE.match(name))}
    pairs = _pairs({name: tensor for name, tensor in header.items() if not _MAGNITUDE.match(name)})
    for module, (down, up) in pairs.items():
        _check_pair(module, down, up, shapes, limits)
    _check_lengths(lengths, pairs, dora=bool(config.get("use_dora")))
    for name, tensor in header.items():
        if not is_finite(tensor):
            raise Refused(Reason.NOT_FINITE, f"{name} holds NaN or infinity")
    # With DoRA the lengths alone may have changed: then the proof decides.
    if not lengths and all(is_zero(up) for _, up in pairs.values()):
        raise Refused(Reason.NO_EFFECT, "every lora_B is zero: the adapter changes nothing")


def _read_config(folder: Path) -> dict[str, Any]:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{pickles[0]} is not safetensors; only safetensors are loaded")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError as error:
        raise Refused(Reason.ARTIFACT_MISSING, f"{CONFIG} is missing") from error
    except ValueError as error:
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{CONFIG} describes no LoRA adapter (peft_type must be LORA)")
    return config


def _check_rank(config: Mapping[str, Any], limits: Limits) -> None:
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *patterns.values()]
    for rank in ranks:
        if not isinstance(rank, int) or rank < 1:
            raise Refused(Reason.STRUCTURE_MISMATCH, f"{CONFIG}: r is {rank!r}, must be a positive integer")
        if rank > limits.max_rank:
            raise Refused(Reason.RANK_TOO_LARGE, _too_large(rank, limits))


def _too_large(rank: int, limits: Limits) -> str:
    return f"rank {rank} exceeds the server's maxRank {limits.max_rank}; raise spec.maxRank of the ModelServer"


def _pairs(header: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (lora_A, lora_B)."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in header.items():
        match = _KEY.match(name)
        if match is None:
            raise Refused(Reason.STRUCTURE_MISMATCH, f"{name} is neither lora_A nor lora_B of a module")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{WEIGHTS} holds no tensor")
    for module, found in parts.items():
        if len(found) != 2:
            raise Refused(Reason.STRUCTURE_MISMATCH, f"{module} has lora_{next(iter(found))} only")
    return {module: (found["A"], found["B"]) for module, found in parts.items()}


def _check_pair(module: str, down: Tensor, up: Tensor, shapes: Shapes, limits: Limits) -> None:
    """lora_A is [rank, in], lora_B [out, rank], the base's weight [out, in]."""
    weight = shapes.get(f"{_from_layers_on(module)}.weight")
    if weight is None:
        raise Refused(Reason.STRUCTURE_MISMATCH, f"the base model has no module {module}")
    if len(down.shape) != 2 or len(up.shape) != 2 or len(weight) != 2:
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{module} is no Linear layer")
    if (up.shape[0], down.shape[1]) != weight or down.shape[0] != up.shape[1]:
        raise Refused(
            Reason.STRUCTURE_MISMATCH,
            f"{module}: lora_A {list(down.shape)} and lora_B {list(up.shape)} do not fit the base's {list(weight)}",
        )
    if down.shape[0] > limits.max_rank:
        raise Refused(Reason.RANK_TOO_LARGE, _too_large(down.shape[0], limits))


def _check_lengths(lengths: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]], *, dora: bool) -> None:
    """DoRA has one for each adapted module, LoRA none: an engine would drop them without a word."""
    for module, (_, up) in pairs.items():
        found = lengths.get(module)
        if (found is not None) != dora:
            has = "has no" if dora else "has a"
            raise Refused(
                Reason.STRUCTURE_MISMATCH, f"{module} {has} lora_magnitude_vector, but {CONFIG} says use_dora: {dora}"
            )
        if found is not None and found.shape != up.shape[:1]:
            raise Refused(
                Reason.STRUCTURE_MISMATCH,
                f"{module}: lora_magnitude_vector {list(found.shape)} does not fit lora_B {list(up.shape)}",
            )
    for module in lengths.keys() - pairs.keys():
        raise Refused(Reason.STRUCTURE_MISMATCH, f"{module} has lora_magnitude_vector only")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
