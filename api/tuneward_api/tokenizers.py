"""Which tokenizer a model's folder has: trainer and engine must choose the same one.

Mistral ships its own tokenizers, tekken.json or a SentencePiece file named by its version, which `mistral-common` reads
and which know how a chat is encoded. vLLM and transformers serve a folder with tekken.json by it, even where a
tokenizer.json stands beside it (whose splitting of words was wrong in several releases: transformers PR 42299). A
SentencePiece file beside a tokenizer.json is left alone, as transformers leaves it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

TEKKEN: Final = "tekken.json"
SENTENCEPIECE: Final = "tokenizer.model"
"""Of Mistral's first version; later ones have the version behind it: tokenizer.model.v3."""
_VERSIONED: Final = re.compile(r".*\.model\.v(\d+)(?:m\d+)?")
_FAMILY: Final = ("mistral", "mixtral", "ministral", "pixtral", "voxtral")


def mistral_tokenizer(folder: Path) -> Path | None:
    """The file that mistral-common reads, or None where the folder's tokenizer is one of transformers."""
    if (folder / TEKKEN).is_file():
        return folder / TEKKEN
    if (folder / "tokenizer.json").is_file():
        return None
    versions = {int(found[1]): file for file in folder.glob("*.model.v*") if (found := _VERSIONED.fullmatch(file.name))}
    if versions:
        return versions[max(versions)]
    unversioned = folder / SENTENCEPIECE
    return unversioned if unversioned.is_file() and _model_type(folder).startswith(_FAMILY) else None


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_bytes()).get("model_type", ""))
    except (OSError, ValueError):
        return ""
