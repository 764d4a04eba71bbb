"""Where the turns of a text stand among its tokens, told by the tokens that part it instead of by offsets.

A tokenizer cuts a text at its added tokens (<|im_end|> and the like) before anything else, so what stands between two of
them has the tokens that it has alone. The added tokens are found in the text and among the ids; both rows must be the same,
and what stands between one of them and the place that is looked for must begin with the tokens that it has alone. That costs
a fraction of what offsets do, which are an object for each token. Only tokenizers of which all of this holds are read so:
BPE on bytes that changes nothing of a text (but to compose it, which most texts are) and puts no space before it, and BPE on
characters with ▁ for a space, as Gemma has it. Wherever a place is not found so, offsets tell.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data.plans import Added, Places, Plan, planned
from tuneward_trainer.data.render import Rendered
from tuneward_trainer.data.shapes import Frame

SPACE: Final = "▁"
"""What stands for a space where tokens are of characters (SentencePiece)."""
_SPACED: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PARTS_NOTHING: Final = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's, as no space is left by then."""
_TAILS: Final = 4096
"""Texts behind an added token whose tokens are remembered."""
_PLANS: Final = 4096
"""Frames whose plans are remembered."""


class Tails:
    """The ids of short texts by themselves. `encode` gives those of one."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def __getitem__(self, text: str) -> list[int]:
        found = self._known.get(text)
        if found is None:
            if len(self._known) == _TAILS:
                self._known.clear()
            found = self._known[text] = self._encode(text)
        return found


class Marks:
    """`added`: id -> text of the tokenizer's added tokens; `stops`: those at which generation ends; `special`: those that
    may end a turn; `composes`: texts are brought into NFC, so that only those that are can be told."""

    def __init__(
        self, added: dict[int, str], stops: set[int], special: set[int], tails: Tails, *, composes: bool = False
    ) -> None:
        self._stops, self._special, self._tails, self._composes = stops, special, tails, composes
        self._ids = {text: number for number, text in added.items()}
        # The first alternative that fits is taken, so the longest stands first: as tokenizers chooses.
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))))
        self._is_added = np.zeros(max(added) + 2, np.bool_)  # the last entry stands for all ids behind it
        self._is_added[list(added)] = True
        self._plans: dict[Frame, Plan | None] = {}

    @classmethod
    def of(cls, tokenizer: Any, stops: set[int], tails: Tails) -> Self | None:
        """None where the tokenizer is not of the kind that this holds for."""
        added = {int(number): token for number, token in tokenizer.added_tokens_decoder.items()}
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        backend = tokenizer.backend_tokenizer
        is_known = type(backend.model).__name__ == "BPE" and (_is_on_bytes(backend) or spaces_alone(backend))
        if not added or not plain or not stops <= added.keys() or not is_known:
            return None
        special = {number for number, token in added.items() if token.special}
        texts = {number: token.content for number, token in added.items()}
        return cls(texts, stops, special, tails, composes=composes(backend))

    def places(self, text: Rendered, ids: NDArray[np.int32]) -> Places | None:
        """Of the spans of the text; None where one cannot be told so."""
        if self._composes and not unicodedata.is_normalized("NFC", text.text):
            return None
        indices = np.flatnonzero(self._is_added.take(ids, mode="clip"))
        plan = self._plan(text.frame) if text.frame is not None else None
        if plan is not None and (planned := plan.places(ids, indices)):
            return planned
        matches = list(self._pattern.finditer(text.text))
        if ids[indices].tolist() != [self._ids[match[0]] for match in matches]:
            return None
        starts, ends = [match.start() for match in matches], [match.end() for match in matches]
        marked = _Marked(text.text, ids.tolist(), starts, ends, indices.tolist(), self._tails)
        places = Places([], [])
        for start, end in text.spans:
            first, last = marked.index(start), marked.index(end)
            if first is None or last is None:
                return None
            places.add(first, last, self._stop(marked, first, end), turns=text.turns)
        return places

    def _plan(self, frame: Frame) -> Plan | None:
        if frame not in self._plans:
            if len(self._plans) == _PLANS:
                self._plans.clear()
            self._plans[frame] = planned(frame, Added(self._pattern, self._ids, self._stops, self._special), self._tails)
        return self._plans[frame]

    def _stop(self, marked: _Marked, first: int, end: int) -> int | None:
        """Index behind the token that ends the turn: among the special tokens at the end, with what space the template puts
        between them, the first at which generation ends, else the last."""
        last, stop = None, None
        place = bisect_right(marked.ends, end) - 1
        while place >= 0 and (index := marked.indices[place]) >= first and not marked.text[marked.ends[place] : end].strip():
            number = marked.ids[index]
            if number in self._stops:
                stop = index + 1
            elif number in self._special:
                last = last or index + 1
            else:
                break
            end = marked.starts[place]
            place -= 1
        return stop or last


@dataclass(frozen=True)
class _Marked:
    """A text and its ids. `starts`, `ends`: where in the text its added tokens stand, in order; `indices`: where among the
    ids."""

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]
    indices: list[int]
    tails: Tails

    def index(self, place: int) -> int | None:
        """Of the first token at or behind a place in the text; None where a token may reach across it."""
        if place == len(self.text):
            return len(self.ids)
        count = bisect_right(self.ends, place)
        if count < len(self.starts) and self.starts[count] <= place:
            return self.indices[count] if self.starts[count] == place else None
        start, first = (self.ends[count - 1], self.indices[count - 1] + 1) if count else (0, 0)
        if start == place:
            return first
        tail = self.tails[self.text[start:place]] if count else None
        if tail is None or self.ids[first : first + len(tail)] != tail:
            return None
        return first + len(tail)


def composes(backend: Any) -> bool:
    """Whether it brings texts into NFC."""
    return described(backend.normalizer) == {"type": "NFC"}


def spaces_alone(backend: Any) -> bool:
    """Whether all it does to a text is to write a space in another way: it parts texts at added tokens only."""
    return described(backend.normalizer) == _SPACED and described(backend.pre_tokenizer) in ({}, _PARTS_NOTHING)


def _is_on_bytes(backend: Any) -> bool:
    """Whether it encodes bytes, puts nothing before a text and at most composes it."""
    before = described(backend.pre_tokenizer)
    steps = before.get("pretokenizers", [before])
    on_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    return (
        (backend.normalizer is None or composes(backend))
        and len(on_bytes) == 1
        and on_bytes[0] is steps[-1]
        and not on_bytes[0]["add_prefix_space"]
    )


def described(part: Any) -> dict[str, Any]:
    """What stands in tokenizer.json of a part of a tokenizer: all of that file is megabytes of words."""
    return dict(json.loads(part.__getstate__())) if part is not None else {}
