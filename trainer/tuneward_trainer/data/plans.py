"""Where the turns of all conversations of one frame stand among their tokens, worked out once for the frame.

What a template puts around texts holds the same added tokens whatever the texts are. Where a conversation has these among
its ids and no others, each place is so many tokens behind one of them: marks.py looks for them in every text, here numpy
takes them from the ids alone. That holds if no added token can begin in what is around a text and end in the text, or the
other way round: a frame of which that cannot be told has no plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tuneward_trainer.data.shapes import Frame


class Places(NamedTuple):
    """Where the learnt spans of a text stand among its tokens. `bounds`: [index of the first token, index behind the last]
    of each, where a turn's last is what ends it; `ended`: whether a token ends it."""

    bounds: list[list[int]]
    ended: list[bool]

    def add(self, first: int, last: int, stop: int | None, *, turns: bool) -> None:
        """Indices of a span's first token, of the first one behind it, and behind the token that ends it, if one does."""
        self.bounds.append([first, stop if stop is not None and turns else last])
        self.ended.append(stop is not None)

    def behind(self, count: int) -> Places:
        """With as many tokens before the text; a span from the first token on has them too."""
        return Places([[first + count if first else 0, last + count] for first, last in self.bounds], self.ended)


class Alone(Protocol):
    def __getitem__(self, text: str) -> list[int]:
        """The ids of a short text by itself."""


class Added(NamedTuple):
    """A tokenizer's added tokens. `pattern` finds them in a text; `stops`: those at which generation ends; `special`: those
    that may end a turn."""

    pattern: re.Pattern[str]
    ids: Mapping[str, int]
    stops: AbstractSet[int]
    special: AbstractSet[int]

    def parted(self, part: str) -> bool:
        """Whether no added token reaches across an end of a part, whatever stands before and behind it."""
        for token in self.ids:
            inner = range(1, len(token))
            if any(part.endswith(token[:count]) or part.startswith(token[count:]) for count in inner):
                return False
            if part in token and part != token:
                return False
        return bool(part)


class _Edge(NamedTuple):
    """A place `tail` behind added token number `mark` of a text, or before it where `tail` is None."""

    mark: int
    tail: str | None


@dataclass(frozen=True, eq=False)
class Plan:
    """`marks`: ids of all added tokens, as bytes of int32. `bounds`: as Places has them, each by the number of a mark and
    how many tokens behind it (int64 [spans, 2] both). `to_end`: the last span ends with the text, and no token ends it.
    `tails`: what must stand behind marks: their numbers, how many tokens behind (int64 [tokens] both), and the ids."""

    marks: bytes
    bounds: tuple[NDArray[np.int64], NDArray[np.int64]]
    ended: list[bool]
    to_end: bool
    tails: tuple[NDArray[np.int64], NDArray[np.int64], bytes]

    def places(self, ids: NDArray[np.int32], added: NDArray[np.intp]) -> Places | None:
        """Of the spans of a text with these ids, of which those at `added` are added tokens; None where they are others."""
        if ids[added].tobytes() != self.marks:
            return None
        marks, counts, tails = self.tails
        try:
            if ids[added[marks] + counts].tobytes() != tails:
                return None
        except IndexError:  # the text ends before
            return None
        marks, counts = self.bounds
        bounds: list[list[int]] = (added[marks] + counts).tolist()
        if self.to_end:
            bounds[-1][1] = len(ids)
        return Places(bounds, self.ended)


def planned(frame: Frame, added: Added, alone: Alone) -> Plan | None:
    """None where a place cannot be told by the frame alone."""
    if not all(added.parted(part) for part in set(frame.around)):
        return None
    parts = [_Part(part, list(added.pattern.finditer(part))) for part in frame.around]
    before = np.cumsum([0, *(len(part.matches) for part in parts)]).tolist()
    firsts = [parts[turn].edge(len(frame.around[turn]) - chars, before[turn]) for turn, chars, _ in frame.learnt]
    stops = [parts[turn + 1].stop(behind, before[turn + 1], added) for turn, _, behind in frame.learnt]
    lasts = [
        parts[turn + 1].edge(behind, before[turn + 1]) if stop < 0 else _Edge(stop, "")
        for (turn, _, behind), stop in zip(frame.learnt, stops, strict=True)
    ]
    turn, _, behind = frame.learnt[-1]
    to_end = stops[-1] < 0 and turn + 2 == len(parts) and behind == len(frame.around[-1])
    if to_end:
        lasts[-1] = _Edge(0, None)  # where the ids end
    edges = [edge for pair in zip(firsts, lasts, strict=True) for edge in pair if edge is not None]
    if len(edges) < 2 * len(frame.learnt):
        return None
    tails = [(edge, alone[edge.tail] if edge.tail else []) for edge in edges]
    places = [(edge.mark, 0 if edge.tail is None else 1 + len(tail)) for edge, tail in tails]
    behind_marks = [(edge.mark, count, token) for edge, tail in tails for count, token in enumerate(tail, 1)]
    bounds = np.asarray(places, np.int64).reshape(-1, 2, 2)
    marks, counts, ids = np.asarray(behind_marks, np.int64).reshape(-1, 3).T
    return Plan(
        marks=_as_bytes([added.ids[match[0]] for part in parts for match in part.matches]),
        bounds=(bounds[..., 0], bounds[..., 1]),
        ended=[stop >= 0 for stop in stops],
        to_end=to_end,
        tails=(marks, counts, _as_bytes(ids)),
    )


def _as_bytes(ids: ArrayLike) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


class _Part(NamedTuple):
    """What stands between two texts, and the added tokens in it."""

    text: str
    matches: list[re.Match[str]]

    def edge(self, place: int, before: int) -> _Edge | None:
        """`before`: added tokens of the parts before. None where none in this part tells of the place."""
        count = sum(match.end() <= place for match in self.matches)
        if count < len(self.matches) and self.matches[count].start() <= place:
            return _Edge(before + count, None) if self.matches[count].start() == place else None
        return _Edge(before + count - 1, self.text[self.matches[count - 1].end() : place]) if count else None

    def stop(self, place: int, before: int, added: Added) -> int:
        """Number of the token that ends the turn which ends at a place, -1 if none does: as marks.py tells it."""
        last = stop = -1
        for number in range(sum(match.end() <= place for match in self.matches) - 1, -1, -1):
            match = self.matches[number]
            token = added.ids[match[0]]
            if self.text[match.end() : place].strip() or not (token in added.stops or token in added.special):
                break
            if token in added.stops:
                stop = before + number
            elif last < 0:
                last = before + number
            place = match.start()
        return stop if stop >= 0 else last
