"""A base model's tokenizer, of one of two kinds: transformers' fast ones with a chat template, or Mistral's own.

The rest of the trainer knows only what both have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tuneward_api.tokenizers import mistral_tokenizer
from tuneward_trainer.data.encode import Encoder, SampleEncoder
from tuneward_trainer.data.render import LossOn
from tuneward_trainer.facts import stop_ids
from tuneward_trainer.report import model_unsupported


class Tokenizer(Protocol):
    """`files`: names in the model's folder that its tokens depend on; `chat_digest`: sha256 of what says how a chat is
    encoded, None where nothing does: a served model must encode as the trained one did."""

    @property
    def files(self) -> Sequence[str]: ...

    @property
    def chat_digest(self) -> str | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encoder(self, loss_on: LossOn) -> SampleEncoder: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are shown."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises EndError (ModelUnsupported)."""
    file = mistral_tokenizer(folder)
    if file is None:
        return TemplateTokenizer(folder)
    from tuneward_trainer.data.mistral import OwnTokenizer, UnreadableError

    try:
        return OwnTokenizer(file)
    except UnreadableError as error:
        raise model_unsupported(f"the base model's tokenizer cannot be read: {error}") from error


class TemplateTokenizer:
    """A fast tokenizer of transformers; a chat is encoded by the model's template."""

    files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

    def __init__(self, folder: Path) -> None:
        """Raises EndError (ModelUnsupported) where the tokenizer is missing or knows no offsets."""
        self._fast = _load_fast(folder)
        self._stops = stop_ids(folder)

    @property
    def chat_digest(self) -> str | None:
        template = self._fast.chat_template
        if not template:
            return None
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self._fast.eos_token_id
        return found

    def encoder(self, loss_on: LossOn) -> Encoder:
        return Encoder(self._fast, loss_on, self._stops)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(ids))


def _load_fast(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # Where mistral-common is installed, Mistral's models would get a tokenizer of another kind.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, mistral_format=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise model_unsupported(f"the base model's tokenizer cannot be read: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise model_unsupported(
            f"the base model's tokenizer ({type(tokenizer).__name__}) gives no offsets, so no exact loss mask; "
            "use a model with a tokenizer.json, or with Mistral's tekken.json"
        )
    return tokenizer
