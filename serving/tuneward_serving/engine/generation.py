"""One text being made: what was asked, what came out so far, and where it goes. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tuneward_serving.engine.text import TextStream

BASE = "__base__"
"""PEFT's word for "no adapter" in a mixed batch."""

FinishReason = Literal["stop", "length"]
Top = tuple[tuple[int, float], ...]
"""Most likely tokens with their log-probabilities, best first."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`top` asks for that many alternatives beside each token's log-probability; None for neither."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int
    stops: tuple[str, ...] = ()
    ignore_end: bool = False
    top: int | None = None
    prompt_top: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A token with its log-probability (natural), its rank (1 = most likely) and the best alternatives."""

    token: int
    logprob: float
    rank: int
    top: Top = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step brought. `scored` is set when it was asked for; `prompt` once, with the first piece."""

    text: str
    token: int | None
    finish: FinishReason | None = None
    scored: Scored | None = None
    prompt: tuple[Scored, ...] | None = None


@dataclass(eq=False)
class Generation:
    """`emit` is called on the model's thread, with a Piece or with the error that ended it."""

    prompt: Sequence[int]
    slot: str
    sampling: Sampling
    stream: TextStream
    emit: Callable[[Piece | Exception], None]
    end_tokens: frozenset[int]
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False
    finished: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    def accept(self, scored: Scored, prompt: tuple[Scored, ...] | None = None) -> None:
        """Takes the next token, emits what became certain, and knows whether this was the last."""
        self.generated.append(scored.token)
        text, finish = self._advance(scored.token)
        self.finished = finish is not None
        shown = scored if self.sampling.top is not None else None
        self.emit(Piece(text=text, token=scored.token, finish=finish, scored=shown, prompt=prompt))

    def _advance(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self.end_tokens and not self.sampling.ignore_end:
            return self.stream.flush(), "stop"
        text = self.stream.add(token)
        if self.stream.stopped:
            return text, "stop"
        if len(self.generated) >= self.sampling.max_tokens:
            return text + self.stream.flush(), "length"
        return text, None

    def fail(self, error: Exception) -> None:
        self.finished = True
        self.emit(error)
