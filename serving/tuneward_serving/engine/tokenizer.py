"""From a chat to tokens and back, by the tokenizer that the trainer used: transformers' with the model's chat template, or
Mistral's own through mistral-common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Protocol

from jinja2 import TemplateError
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from tuneward_api.tokenizers import mistral_tokenizer
from tuneward_serving.engine.errors import ApiError

_REFUSALS: Final = (MistralCommonException, ValueError, TypeError, KeyError, AssertionError, NotImplementedError)
"""What mistral-common raises for messages that it does not encode."""


class Tokenizer(Protocol):
    """`eos_token_id`: None where the tokenizer knows no end."""

    @property
    def eos_token_id(self) -> int | None: ...

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """What the model is asked with. Raises ApiError."""

    def prompt(self, text: str) -> list[int]:
        """A text as it stands, behind the first token that the model expects."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises OSError or ValueError where there is none."""
    file = mistral_tokenizer(folder)
    return TemplateTokenizer(folder) if file is None else OwnTokenizer(file)


class TemplateTokenizer:
    def __init__(self, folder: Path) -> None:
        # Where mistral-common is installed, Mistral's models would get a tokenizer of another kind.
        self._fast: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, mistral_format=False)

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = self._fast.eos_token_id
        return found

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self._fast.chat_template:
            raise ApiError("the base model has no chat template; use /v1/completions", param="messages")
        try:
            text = self._fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(f"the model's chat template refuses these messages: {error}", param="messages") from error
        ids: list[int] = self._fast(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str) -> list[int]:
        ids: list[int] = self._fast(text)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


class OwnTokenizer:
    """Mistral's: tekken or SentencePiece."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError where mistral-common does not read the file, or would read it wrongly."""
        try:
            self._common: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer.from_file(
                str(file), mode=ValidationMode.test
            )
        except (*_REFUSALS, RuntimeError) as error:
            raise ValueError(f"mistral-common refuses {file.name}: {error}") from error
        self._plain = self._common.instruct_tokenizer.tokenizer
        if self._common.version == TokenizerVersion.v1 and self._plain.is_special(SpecialTokens.begin_inst.value):
            raise ValueError(f"{file.name} is of a later version than its name says; add .v2, .v3 or .v7 to it")

    @property
    def eos_token_id(self) -> int:
        return self._plain.eos_id

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        try:
            request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai([{**one} for one in messages])
            ids: list[int] = self._common.encode_chat_completion(request).tokens
        except _REFUSALS as error:
            raise ApiError(f"mistral-common refuses these messages: {error}", param="messages") from error
        return ids

    def prompt(self, text: str) -> list[int]:
        return self._plain.encode(text, bos=True, eos=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """What stands between two special tokens as text; their names unless they are skipped."""
        if skip_special_tokens:
            return self._plain.decode([one for one in token_ids if not self._plain.is_special(one)])
        runs = groupby(token_ids, key=self._plain.is_special)
        return "".join(
            "".join(self._plain.id_to_piece(one) for one in run) if special else self._plain.decode(list(run))
            for special, run in runs
        )
