"""Samples as the model gets them: every token, and whether it is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Protocol

from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.files import read
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Batch, Source, Worker

_LEARNT: Final = "\x1b[30;42m"
_PLAIN: Final = "\x1b[0m"
_BETWEEN: Final = "|"
_HALF: Final = "\ufffd"
"""What a tokenizer decodes a part of a character to."""


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Shown:
    """One good sample; `tokens` holds the text of each token of each document."""

    file: str
    line: int
    documents: list[Encoded]
    tokens: list[list[str]]


def first_samples(source: Source, worker: Worker, tokenizer: Decoder, count: int) -> Iterator[Shown]:
    """The first `count` good samples of a source."""
    form = source.detected()
    found = 0
    for uri, path in source.files() if count else ():
        try:
            for record in read(path):
                for line, documents, *_ in worker(Batch([record], form, source.fields)).good:
                    yield Shown(uri, line, documents, [pieces(tokenizer, one.ids.tolist()) for one in documents])
                    found += 1
                if found >= count:
                    return
        except SampleError:
            continue  # a broken file is one of the problems that are told


def pieces(tokenizer: Decoder, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands behind the one before; of a character of several tokens the last one's."""
    found: list[str] = []
    start = 0
    for index in range(len(ids)):
        before = tokenizer.decode(ids[max(0, start - 1) : start])
        text = tokenizer.decode(ids[max(0, start - 1) : index + 1])
        if text.endswith(_HALF) and index + 1 < len(ids):
            found.append("")
        else:
            found.append(text.removeprefix(before))
            start = index + 1
    return found


def text_of(tokens: Sequence[str], weights: Sequence[float], *, colour: bool) -> str:
    """Tokens with a bar between two of them; those with a loss coloured, or between ⟦ and ⟧."""
    first, last = (_LEARNT, _PLAIN) if colour else ("⟦", "⟧")
    runs = []
    for learnt, run in groupby(zip(tokens, weights, strict=True), key=lambda one: bool(one[1])):
        text = _BETWEEN.join(_visible(token) for token, _ in run)
        runs.append(f"{first}{text}{last}" if learnt else text)
    return _BETWEEN.join(runs).replace("\\n", "\\n\n")


def _visible(token: str) -> str:
    """Control characters by their escapes: a terminal must show what is there, and do nothing else."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in token)
