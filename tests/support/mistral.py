"""Mistral's tokenizer files: those that mistral-common ships, and small ones of the versions that it does not ship."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import mistral_common
from mistral_common.tokens.tokenizers.base import SpecialTokens

_DATA: Final = Path(mistral_common.__file__).parent / "data"
SHIPPED: Final = {
    "v1": _DATA / "tokenizer.model.v1",
    "v2": _DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": _DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v3-tekken": _DATA / "tekken_240718.json",
    "v3-tekken-images": _DATA / "tekken_240911.json",
    "v7": _DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "v7-images": _DATA / "mistral_instruct_tokenizer_241114.model.v7m1",
}
MADE: Final = ("v7-tekken", "v11-tekken", "v13-tekken", "v15-tekken")
WORDS: Final = 2048
"""Tokens of a made file, bytes among them; its special tokens come before."""
SPECIAL: Final = 64
VOCABULARY: Final = SPECIAL + WORDS
_EFFORTS: Final = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}


def make_tekken(file: Path, version: str) -> Path:
    """The first 2,048 words of a shipped tekken, with all special tokens of today: loads in a moment."""
    content = dict(_shipped())
    content["vocab"] = content["vocab"][:WORDS]
    content["config"] = content["config"] | {
        "version": version,
        "default_vocab_size": VOCABULARY,
        "default_num_special_tokens": SPECIAL,
    }
    content["special_tokens"] = [
        {"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)
    ]
    if version == "v15":
        content["model_settings_builder"] = {"reasoning_effort": _EFFORTS}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


@cache
def _shipped() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(SHIPPED["v3-tekken"].read_bytes())
    return content
