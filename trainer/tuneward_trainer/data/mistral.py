"""Mistral's own tokenizers, tekken and SentencePiece: samples to ids and loss weights, as mistral-common encodes them.

A prompt is what mistral-common gives an engine for the messages before an answer, and learnt is what it puts behind that
prompt once the answer is there, up to its </s>. A conversation is one document where it only ever appends; where it does
not (the system prompt up to version 3, and the tools up to version 11, stand before the last user turn), every learnt turn
becomes one of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import SpecialTokens, Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from tuneward_api.tokenizers import SENTENCEPIECE
from tuneward_trainer.data.documents import Encoded, ids_of
from tuneward_trainer.data.encode import document
from tuneward_trainer.data.formats import Chat, PromptCompletion, Sample, Text
from tuneward_trainer.data.mistral_frames import Frames
from tuneward_trainer.data.mistral_messages import Message, messages_of
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.render import LossOn, as_chat, learnt_turns

Common: TypeAlias = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]
_REFUSALS: Final = (MistralCommonException, ValueError, TypeError, KeyError, AssertionError, NotImplementedError)
"""What mistral-common raises for messages that it does not encode; its checks use all of these."""
_REASON: Final = 300
"""Characters of a reason that are kept: some hold the whole message."""


class UnreadableError(Exception):
    """A tokenizer file that mistral-common does not read, or would read wrongly."""


class OwnTokenizer:
    """`asking` encodes what an engine is asked with, `learning` conversations that end in an answer."""

    def __init__(self, file: Path) -> None:
        """Raises UnreadableError."""
        self.asking = _load(file)
        inner = self.asking.instruct_tokenizer
        # Each encoding would be decoded again, for a text that nobody reads, in as much time.
        setattr(inner, "decode", _nothing)  # noqa: B010 - mypy knows no other way
        self.learning: Common = MistralTokenizer(
            inner,
            get_validator(self.asking.version, mode=ValidationMode.finetuning),
            get_normalizer(self.asking.version, inner.tokenizer.model_settings_builder),
        )
        self._plain = inner.tokenizer
        self._file = file

    def __reduce__(self) -> tuple[type[OwnTokenizer], tuple[Path]]:
        """Another process makes its own."""
        return OwnTokenizer, (self._file,)

    @property
    def files(self) -> tuple[str, ...]:
        return (self._file.name,)

    @property
    def chat_digest(self) -> str:
        """The version says how a chat is encoded, and the file, which may stand in its name only, what the tokens are."""
        content = hashlib.sha256(self._file.read_bytes()).hexdigest()
        return "sha256:" + hashlib.sha256(f"mistral-common {self.version} {content}".encode()).hexdigest()

    @property
    def eos_token_id(self) -> int:
        return self._plain.eos_id

    @property
    def version(self) -> str:
        return str(self.asking.version.value)

    def encoder(self, loss_on: LossOn) -> MistralEncoder:
        return MistralEncoder(self, loss_on)

    def text(self, text: str) -> list[int]:
        """A text without turns, from <s> to </s>."""
        return self._plain.encode(text, bos=True, eos=True)

    def alone(self, text: str) -> list[int]:
        """A text that stands between control tokens."""
        return self._plain.encode(text, bos=False, eos=False)

    def is_special(self, number: int) -> bool:
        return self._plain.is_special(number)

    def special(self, token: SpecialTokens) -> int | None:
        """Its id, if the vocabulary has it as a special token."""
        return self._plain.get_special_token(token.value) if self._plain.is_special(token.value) else None

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens by their names; what stands between two of them as text."""
        runs = groupby(ids, key=self._plain.is_special)
        return "".join(
            "".join(self._plain.id_to_piece(one) for one in run) if special else self._plain.decode(list(run))
            for special, run in runs
        )


def _load(file: Path) -> Common:
    """Raises UnreadableError."""
    try:
        found: Common = MistralTokenizer.from_file(str(file), mode=ValidationMode.test)
    except (*_REFUSALS, OSError, RuntimeError) as error:
        raise UnreadableError(f"mistral-common refuses {file.name}: {_reason(error)}") from error
    inner = found.instruct_tokenizer.tokenizer
    if found.version == TokenizerVersion.v1 and inner.is_special(SpecialTokens.begin_inst.value):
        raise UnreadableError(
            f"{file.name} holds control tokens, so it is of a later version than the first, which its name does not say; "
            f"rename it {SENTENCEPIECE}.v2, .v3 or .v7, as its maker calls it"
        )
    return found


def _nothing(*_: object, **__: object) -> str:
    return ""


def _reason(error: Exception) -> str:
    """In one line; pydantic's errors come in several, and the first only counts them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= _REASON else text[:_REASON] + "…"


class MistralEncoder:
    """The same interface as `data.encode.Encoder`."""

    def __init__(self, tokenizer: OwnTokenizer, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._frames = Frames(tokenizer.alone, tokenizer.is_special)

    def __reduce__(self) -> tuple[type[MistralEncoder], tuple[OwnTokenizer, LossOn]]:
        """Another process begins with no frames."""
        return MistralEncoder, (self._tokenizer, self._loss_on)

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        """One entry for each sample: its documents, or what is wrong with it."""
        return [self._encode(sample) for sample in samples]

    def _encode(self, sample: Sample) -> list[Encoded] | SampleError:
        try:
            if isinstance(sample, Text):
                ids = self._tokenizer.text(sample.text)
                return [document(ids_of(ids), np.ones(len(ids), np.bool_))]
            return self._chat(as_chat(sample) if isinstance(sample, PromptCompletion) else sample)
        except SampleError as error:
            return error

    def _chat(self, chat: Chat) -> list[Encoded]:
        if self._loss_on == "All":
            return [_Conversation(chat, self._tokenizer).everything()]
        learnt = learnt_turns(chat, self._loss_on)
        shape, conversation = self._frames.shape(chat, learnt), _Conversation(chat, self._tokenizer)
        if shape is not None and (known := self._frames.encoded(shape, chat, conversation.as_one)) is not None:
            return [known]
        whole = conversation.as_one(learnt)
        if shape is not None and whole is not None:
            self._frames.learn(shape, chat, whole)
        documents = [whole] if whole is not None else [conversation.turn(index) for index in learnt]
        conversation.check_tools(learnt[-1] + 1)
        return documents


class _Conversation:
    """One conversation and its encodings."""

    def __init__(self, chat: Chat, tokenizer: OwnTokenizer) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._messages = messages_of(chat)
        self._known: dict[tuple[int, bool], list[int]] = {}

    def prompt(self, index: int) -> list[int]:
        """What an engine is asked with for turn `index`."""
        if index == 0:
            raise SampleError(self._chat.path(0), "is an assistant turn that follows nothing", "a user turn before it")
        return self._upto(index, answered=False)

    def upto(self, count: int) -> list[int]:
        """The first `count` messages."""
        return self._upto(count, answered=self._messages[count - 1]["role"] == "assistant")

    def _upto(self, count: int, *, answered: bool) -> list[int]:
        key = (count, answered)
        if key not in self._known:
            common = self._tokenizer.learning if answered else self._tokenizer.asking
            self._known[key] = self._encode(self._messages[:count], common)
        return self._known[key]

    def _encode(self, messages: list[Message], common: Common) -> list[int]:
        try:
            request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(messages, tools=self._chat.tools)
            return common.encode_chat_completion(request).tokens
        except _REFUSALS as error:
            raise SampleError(
                self._chat.field,
                f"is refused by mistral-common: {_reason(error)}",
                f"the turns that Mistral's tokenizer {self._tokenizer.version} encodes",
            ) from error

    def check_tools(self, count: int) -> None:
        """Tools that do not reach the tokens of the first `count` messages would silently not be learnt."""
        if self._chat.tools and self._tokenizer.special(SpecialTokens.begin_tools) not in self.upto(count):
            raise SampleError(
                "tools",
                f"does not reach the tokens: Mistral's tokenizer {self._tokenizer.version} encodes none here",
                "leave it out, or use a model of a later version; tools stand before a user turn",
            )

    def as_one(self, learnt: list[int]) -> Encoded | None:
        """The whole conversation up to the last learnt turn, or None where earlier turns are encoded otherwise in it."""
        turns = [(self.prompt(index), self.upto(index + 1)) for index in learnt]
        whole = turns[-1][1]
        learnt_ids = np.zeros(len(whole), np.bool_)
        for before, after in turns:
            if not (_begins(whole, after) and _begins(after, before)):
                return None
            learnt_ids[len(before) : len(after)] = True
        return document(ids_of(whole), learnt_ids)

    def turn(self, index: int) -> Encoded:
        """The conversation up to turn `index`, which alone is learnt."""
        before, after = self.prompt(index), self.upto(index + 1)
        if not _begins(after, before):
            raise SampleError(
                self._chat.path(index),
                "cannot be learnt: mistral-common encodes what stands before it differently once it is answered",
                "answers that stand behind the prompt that asks for them",
            )
        return document(ids_of(after), np.arange(len(after)) >= len(before))

    def everything(self) -> Encoded:
        """lossOn All: every token but those of assistant turns of weight 0."""
        whole = self.upto(len(self._messages))
        self.check_tools(len(self._messages))
        learnt = np.ones(len(whole), np.bool_)
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant" and not self._chat.weights[index]:
                before, after = self.prompt(index), self.upto(index + 1)
                if not (_begins(whole, after) and _begins(after, before)):
                    raise SampleError(
                        f"{self._chat.path(index)}.weight",
                        "is 0, but later turns change how earlier ones are encoded, so the turn has no fixed place",
                        "lossOn Assistant with this model",
                    )
                learnt[len(before) : len(after)] = False
        return document(ids_of(whole), learnt)


def _begins(whole: list[int], part: list[int]) -> bool:
    return whole[: len(part)] == part
