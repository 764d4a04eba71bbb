"""Reads safetensors without torch: the agent beside an engine must start in a second and stay small.

Format: 8 bytes little-endian header length, the header as JSON {name: {dtype, shape, data_offsets}}, then the data.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAX_HEADER = 100_000_000
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class WeightsError(Exception):
    """A file is not safetensors; the text names it."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a header; `start` and `end` are bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Names to tensors. Raises WeightsError; reads no data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise WeightsError(f"{path} is not a safetensors file: its header would have {length} bytes")
            entries = json.loads(file.read(length))
        size = path.stat().st_size
        return {name: _tensor(path, entry, 8 + length, size) for name, entry in entries.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error


def _tensor(path: Path, entry: dict[str, object], offset: int, size: int) -> Tensor:
    start, end = (int(value) + offset for value in entry["data_offsets"])  # type: ignore[attr-defined]
    if not offset <= start <= end <= size:
        raise WeightsError(f"{path} is cut short: it has {size} bytes and names byte {end}")
    return Tensor(path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, end)  # type: ignore[attr-defined]


def read_bytes(tensor: Tensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. Kinds without infinities are; bfloat16 is looked at bit by bit."""
    data = read_bytes(tensor)
    if tensor.dtype == "BF16":
        bits = np.frombuffer(data, dtype=np.uint16)
        return not bool(((bits & 0x7F80) == 0x7F80).any())
    if tensor.dtype in _FLOATS:
        return bool(np.isfinite(_as_floats(tensor.dtype, data)).all())
    return True


def is_zero(tensor: Tensor) -> bool:
    """Whether every number is 0 (or -0)."""
    data = read_bytes(tensor)
    if tensor.dtype == "BF16":
        return not bool((np.frombuffer(data, dtype=np.uint16) & 0x7FFF).any())
    if tensor.dtype in _FLOATS:
        return not bool(_as_floats(tensor.dtype, data).any())
    return not any(data)


def _as_floats(dtype: str, data: bytes) -> NDArray[np.floating]:
    return np.frombuffer(data, dtype=_FLOATS[dtype])


def read_model_header(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_header(folder / "model.safetensors")
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of shards: {error}") from error
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= read_header(folder / str(shard))
    return found
