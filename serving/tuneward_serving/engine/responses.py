"""What the routes give: OpenAI's bodies, with vLLM's `prompt_logprobs`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from tuneward_serving.engine.generation import FinishReason, Piece, Scored
from tuneward_serving.engine.text import Decoder

Json = dict[str, Any]


@dataclass
class Answer:
    """The pieces of one text, gathered."""

    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    scored: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored, ...] | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += 1
        self.finish = piece.finish
        self.prompt = piece.prompt if piece.prompt is not None else self.prompt
        if piece.scored is not None:
            self.scored.append(piece.scored)


@dataclass(frozen=True)
class Head:
    """What every body and chunk of one answer repeats."""

    id: str
    object: str
    created: int
    model: str

    def body(self, choices: Sequence[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **more,
        }


def new_head(prefix: str, kind: str, model: str) -> Head:
    return Head(id=f"{prefix}-{secrets.token_hex(12)}", object=kind, created=int(time()), model=model)


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Words:
    """Tokens as people read them."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        return self._tokenizer.decode([token])


def chat_logprobs(scored: Sequence[Scored], words: Words) -> Json:
    def entry(token: int, logprob: float) -> Json:
        return {"token": words(token), "logprob": logprob, "bytes": list(words(token).encode())}

    return {
        "content": [{**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in scored]
    }


def completion_logprobs(
    scored: Sequence[Scored], words: Words, *, echoed: Sequence[int] = (), prompt: Sequence[Scored] = ()
) -> Json:
    """`echoed` are the prompt's tokens when they are part of the text; the first of them has no log-probability."""
    first = [words(token) for token in echoed[:1]]
    everything = [*(prompt if echoed else ()), *scored]
    tokens = [*first, *(words(one.token) for one in everything)]
    offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [*(None for _ in first), *(one.logprob for one in everything)],
        "top_logprobs": [*(None for _ in first), *({words(t): p for t, p in one.top} for one in everything)],
        "text_offset": offsets,
    }


def prompt_logprobs(prompt: Sequence[Scored], words: Words) -> list[Json | None]:
    """vLLM's: None for the first token, then {token id: {logprob, rank, decoded_token}}, the token itself first."""

    def entries(one: Scored) -> Json:
        found = {str(one.token): {"logprob": one.logprob, "rank": one.rank, "decoded_token": words(one.token)}}
        for rank, (token, logprob) in enumerate(one.top, 1):
            found.setdefault(str(token), {"logprob": logprob, "rank": rank, "decoded_token": words(token)})
        return found

    return [None, *(entries(one) for one in prompt)]
