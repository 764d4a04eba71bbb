"""What prepare must know about a base model before anything is loaded: counts, layers, limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneward_trainer.report import model_unsupported

_LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class Facts:
    """`empty` is the model on the meta device; `max_length` the longest text it was made for, in tokens, if it says so."""

    architecture: str
    model_type: str
    parameters: int
    max_length: int | None
    empty: Any


def examine(folder: Path) -> Facts:
    """Raises EndError (ModelUnsupported)."""
    from transformers import AutoConfig

    from tuneward_trainer.model import ModelUnsupportedError, build_empty, model_class, read_config

    try:
        raw = read_config(folder)
        _refuse_quantised(raw)
        kind = model_class(raw)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _facts(kind.__name__, str(raw.get("model_type", "")), config.get_text_config(), build_empty(config, kind))
    except (ModelUnsupportedError, ImportError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise model_unsupported(f"the base model cannot be trained: {error}") from error


def _facts(architecture: str, model_type: str, text: Any, empty: Any) -> Facts:
    return Facts(
        architecture=architecture,
        model_type=model_type,
        parameters=sum(parameter.numel() for parameter in empty.parameters()),
        max_length=next((int(length) for name in _LENGTHS if (length := getattr(text, name, None))), None),
        empty=empty,
    )


def _refuse_quantised(raw: dict[str, Any]) -> None:
    from tuneward_trainer.model import DEQUANTISED, quantised

    method = quantised(raw)
    if method is not None and method not in DEQUANTISED:
        raise model_unsupported(
            f"the base model is quantised ({method}); use the same model in bf16 or fp32, or in {' or '.join(DEQUANTISED)}, "
            "which loading undoes"
        )


def stop_ids(folder: Path) -> list[int]:
    """Ids at which generation ends, from generation_config.json."""
    try:
        found = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        return []
    if isinstance(found, int):
        return [found]
    return [int(number) for number in found or []]
