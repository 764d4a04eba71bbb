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
from numpy.typing import NDArray

from tuneward_trainer.data.shapes import Frame


class Place(NamedTuple):
    """Indices among the tokens of a span that is learnt: of its first token, of the first one behind it, and of the one
    behind what ends the turn, None if nothing does."""

    first: int
    last: int
    stop: int | None

    def behind(self, count: int) -> Place:
        """With as many tokens before the text; a span from the first token on has them too."""
        stop = self.stop + count if self.stop is not None else None
        return Place(self.first + count if self.first else 0, self.last + count, stop)


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
    """`marks`: ids of all added tokens, int32 [marks]. For each span: numbers of the mark that its first token stands behind
    and of that behind its last (int64 [spans]), how many tokens behind it (int64 [spans]), and the mark that ends it, -1 if
    none does. `ends`: the last span ends with the text. `tails`: (marks, the ids that stand behind each)."""

    marks: NDArray[np.int32]
    first: tuple[NDArray[np.int64], NDArray[np.int64]]
    last: tuple[NDArray[np.int64], NDArray[np.int64]]
    stop: NDArray[np.int64]
    ends: bool
    tails: list[tuple[NDArray[np.int64], NDArray[np.int32]]]

    def places(self, ids: NDArray[np.int32], added: NDArray[np.intp]) -> list[Place] | None:
        """Of each span of a text with these ids, of which those at `added` are added tokens; None where they are others."""
        if len(added) != len(self.marks) or not np.array_equal(ids[added], self.marks):
            return None
        for marks, tail in self.tails:
            behind = added[marks][:, None] + np.arange(1, len(tail) + 1)
            if behind.max() >= len(ids) or not (ids[behind] == tail).all():
                return None
        firsts, lasts = (added[marks] + counts for marks, counts in (self.first, self.last))
        if self.ends:
            lasts[-1] = len(ids)
        stops = np.where(self.stop < 0, 0, added[self.stop] + 1)
        found = zip(firsts.tolist(), lasts.tolist(), stops.tolist(), strict=True)
        return [Place(first, last, stop or None) for first, last, stop in found]


def planned(frame: Frame, added: Added, alone: Alone) -> Plan | None:
    """None where a place cannot be told by the frame alone."""
    if not all(added.parted(part) for part in set(frame.around)):
        return None
    parts = [_Part(part, list(added.pattern.finditer(part))) for part in frame.around]
    before = np.cumsum([0, *(len(part.matches) for part in parts)]).tolist()
    firsts = [parts[turn].edge(len(frame.around[turn]) - chars, before[turn]) for turn, chars, _ in frame.learnt]
    lasts = [parts[turn + 1].edge(behind, before[turn + 1]) for turn, _, behind in frame.learnt]
    stops = [parts[turn + 1].stop(behind, before[turn + 1], added) for turn, _, behind in frame.learnt]
    turn, _, behind = frame.learnt[-1]
    ends = turn + 2 == len(parts) and behind == len(frame.around[-1])
    if ends:
        lasts[-1] = _Edge(0, None)  # where the ids end
    edges = [edge for edge in (*firsts, *lasts) if edge is not None]
    if len(edges) < 2 * len(frame.learnt):
        return None
    tails = {edge.tail: alone[edge.tail] for edge in edges if edge.tail}
    counts = [0 if edge.tail is None else 1 + len(tails.get(edge.tail, ())) for edge in edges]
    places = np.asarray([[edge.mark for edge in edges], counts], np.int64).reshape(2, 2, -1)
    return Plan(
        marks=np.asarray([added.ids[match[0]] for part in parts for match in part.matches], np.int32),
        first=(places[0, 0], places[1, 0]),
        last=(places[0, 1], places[1, 1]),
        stop=np.asarray(stops, np.int64),
        ends=ends,
        tails=[
            (np.asarray([edge.mark for edge in edges if edge.tail == tail], np.int64), np.asarray(ids, np.int32))
            for tail, ids in tails.items()
        ],
    )


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
