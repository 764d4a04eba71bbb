"""Plain conversations of users and assistants, without mistral-common's whole way for each.

Its way is long: it checks a request, and has to be asked for the prompt of each answer and for the talk with it, which is a
hundred times what encoding the texts takes. But what stands between two control tokens it encodes by itself. So of plain
conversations the tokens between texts are the same, whatever is said, and where texts begin and end is known.

That is proved by the data: from conversations that went the whole way it is learnt what stands between texts, if each is
found between control tokens; then, of each length up to a factor of two, one that is encoded both ways must come out the
same, tokens and mask, before texts of that length are encoded alone. Whatever is more than plain turns (tools, calls,
thoughts, turns of one role behind each other) goes the whole way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data.documents import Encoded, ids_of
from tuneward_trainer.data.formats import Chat

_PLAIN: Final = {"role", "content"}
_EDGE: Final = ""
"""Before the first turn, and behind the last."""
Ids: TypeAlias = NDArray[np.int32]


class Shape(NamedTuple):
    """`roles` of the turns up to the last learnt one; `learnt`: indices of those with a loss."""

    roles: tuple[str, ...]
    learnt: frozenset[int]

    @property
    def gaps(self) -> list[tuple[str, str]]:
        """Roles before and behind each."""
        return list(pairwise((_EDGE, *self.roles, _EDGE)))

    @property
    def kind(self) -> tuple[bool, int]:
        """What one proof holds for."""
        return self.roles[0] == "system", len(self.roles).bit_length()


@dataclass
class _Frame:
    """`between`: the ids between two roles; `ending`: how many of them belong to a learnt turn before them."""

    between: dict[tuple[str, str], Ids] = field(default_factory=dict)
    ending: dict[tuple[str, str], int] = field(default_factory=dict)

    def around(self, shape: Shape, texts: Sequence[Ids]) -> Encoded | None:
        """None where something is not known yet."""
        gaps = shape.gaps
        known = self.between.keys() >= set(gaps) and self.ending.keys() >= {gaps[index + 1] for index in shape.learnt}
        if not known:
            return None
        ids, sizes = [self.between[gaps[0]]], [len(self.between[gaps[0]])]
        for text, gap in zip(texts, gaps[1:], strict=True):
            ids += [text, self.between[gap]]
            sizes += [len(text), len(self.between[gap])]
        starts = np.cumsum([0, *sizes])
        weights = np.zeros(starts[-1], np.float16)
        for index in shape.learnt:
            behind = starts[2 * index + 2] + self.ending[gaps[index + 1]]
            weights[starts[2 * index + 1] : behind] = 1
        return Encoded(np.concatenate(ids), weights)

    def teach(self, shape: Shape, places: Sequence[tuple[int, int]], found: Encoded) -> bool:
        """What stands between the texts of a conversation, which are at `places`; False where it is not the same as ever."""
        learnt = found.weights != 0
        edges = [0, *(edge for place in places for edge in place), len(found)]
        for number, (gap, start, end) in enumerate(zip(shape.gaps, edges[::2], edges[1::2], strict=True)):
            between = found.ids[start:end]
            if not np.array_equal(self.between.setdefault(gap, between), between):
                return False
            if number - 1 in shape.learnt:
                ending = int(np.argmin(np.append(learnt[start:end], [False])))
                if self.ending.setdefault(gap, ending) != ending:
                    return False
        return True


class Frames:
    """`encode`: the ids of a text alone; `is_special`: whether an id is a control token's."""

    def __init__(self, encode: Callable[[str], list[int]], is_special: Callable[[int], bool]) -> None:
        self._encode, self._is_special = encode, is_special
        self._frames: dict[bool, _Frame | None] = {False: _Frame(), True: _Frame()}
        self._proved: set[tuple[bool, int]] = set()

    def shape(self, chat: Chat, learnt: Sequence[int]) -> Shape | None:
        """None for what is no plain conversation, from a user's or system's turn to the last learnt one."""
        messages = chat.messages[: learnt[-1] + 1]
        roles = tuple(message["role"] for message in messages)
        talk = roles[roles[0] == "system" :]
        alternates = talk == ("user", "assistant") * (len(talk) // 2)
        if chat.tools or not alternates or not all(map(_is_plain, messages)):
            return None
        return Shape(roles, frozenset(learnt))

    def encoded(self, shape: Shape, chat: Chat, whole: Callable[[list[int]], Encoded | None]) -> Encoded | None:
        """`whole`: the whole way, with these turns learnt. None where that is to be gone."""
        frame = self._frames[shape.kind[0]]
        texts = self._texts(shape, chat)
        found = frame.around(shape, texts) if frame is not None else None
        if frame is None or found is None or shape.kind in self._proved:
            return found
        turns = sorted(shape.learnt)
        some = sorted({turns[0], turns[len(turns) // 2], *turns[-2:]})
        if whole(some) != frame.around(shape._replace(learnt=frozenset(some)), texts):
            self._frames[shape.kind[0]] = None
            return None
        self._proved.add(shape.kind)
        return found

    def learn(self, shape: Shape, chat: Chat, found: Encoded) -> None:
        """What became of a conversation that went the whole way."""
        frame = self._frames[shape.kind[0]]
        if frame is not None:
            texts = self._texts(shape, chat)
            places = self._places(texts, found.ids.tolist())
            if places is None or not frame.teach(shape, places, found):
                self._frames[shape.kind[0]] = None

    def _texts(self, shape: Shape, chat: Chat) -> list[Ids]:
        return [ids_of(self._encode(message["content"])) for message in chat.messages[: len(shape.roles)]]

    def _places(self, texts: Sequence[Ids], ids: list[int]) -> list[tuple[int, int]] | None:
        """Where each text stands, None where one does not stand between control tokens."""
        starts = [index + 1 for index, number in enumerate(ids[:-1]) if self._is_special(number)]
        places: list[tuple[int, int]] = []
        for text in texts:
            content, after = text.tolist(), places[-1][1] if places else 0
            ranges = ((start, start + len(content)) for start in starts if start >= after)
            fitting = (place for place in ranges if ids[slice(*place)] == content)
            place = next(fitting, None)
            if place is None or place[1] == len(ids) or not self._is_special(ids[place[1]]):
                return None
            places.append(place)
        return places


def _is_plain(message: dict[str, Any]) -> bool:
    """Versions before the seventh drop spaces behind an answer."""
    content = message["content"] if message.keys() == _PLAIN else None
    return isinstance(content, str) and bool(content.strip()) and not content.endswith(" ")
