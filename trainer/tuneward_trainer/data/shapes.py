"""Long conversations of plain turns, rendered once instead of once a turn.

Whether a template only ever appends is seen by rendering every beginning of a conversation, which takes as many renderings
as it has turns. But for turns of nothing but a role and a text it is a property of the roles, as long as the template only
copies the texts. So it is seen once for a row of roles and all its beginnings, on texts that stand for any. That texts are
copied is proved for a row too, of templates whose code is plain enough (copies.py): its conversations are not rendered any
more. With others it is seen from a conversation's one rendering, which must be the one foretold. A conversation that is
longer than any proved row goes on as the row's last turns did, and its last prompt is rendered too. All else goes the long
way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final, TypeAlias

from tuneward_trainer.data.copies import copies_only, unasked

Messages: TypeAlias = Sequence[dict[str, Any]]
Span: TypeAlias = tuple[int, int]
Quick: TypeAlias = Callable[[Messages, bool], str | None]
"""(messages, whether an answer is asked for) -> text, or None where the template refuses."""
Roles: TypeAlias = tuple[str, ...]
_PLAIN: Final = ("role", "content")
"""What every message has."""
_KNOWN: Final = 4096
"""Rows of roles that are remembered."""
_ROW: Final = 32
"""Turns of the longest row that is proved."""
_FORESEEN: Final = 64
"""Turns of the longest row that is looked at before any comes."""
_TRIED: Final = 16
"""Proofs that are paid in advance; each further one must have been of use to four conversations."""
_TAG: Final = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_STRING: Final = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\"")
_MARK: Final = re.compile(r"[<>\[\]{}|]")


@dataclass(frozen=True)
class Shape:
    """What a template puts around the texts of a row of roles: `around` has one more than there are texts. `learnt`: by
    assistant turn, where it begins before its text and ends behind it. `foretold`: not all of it was proved. `copied`: it is
    proved that any texts of these roles are copied."""

    around: list[str]
    learnt: dict[int, tuple[int, int]]
    foretold: bool = False
    copied: bool = False

    @classmethod
    def of(cls, texts: Sequence[str], whole: str, spans: dict[int, Span]) -> Shape | None:
        """From a rendering of `texts` that stand in it once each, in order; None where they do not, or a span of a turn
        does not hold its text."""
        around, learnt, end = [], {}, 0
        for index, text in enumerate(texts):
            start = whole.find(text, end)
            if start < 0 or whole.count(text) > 1:
                return None
            if index in spans:
                before, after = start - spans[index][0], spans[index][1] - start - len(text)
                if not (0 <= before <= start - end and after >= 0):
                    return None
                learnt[index] = (before, after)
            around.append(whole[end:start])
            end = start + len(text)
        return cls([*around, whole[end:]], learnt)

    def beginning(self, count: int) -> Shape:
        """Of the first `count` turns, of which the last is the assistant's."""
        _, after = self.learnt[count - 1]
        learnt = {turn: span for turn, span in self.learnt.items() if turn < count}
        return Shape([*self.around[:count], self.around[count][:after]], learnt, self.foretold)

    @property
    def settled(self) -> bool:
        """Whether the last two turns look as the two before them."""
        around, last = self.around, len(self.around) - 2
        same = last > 3 and around[last] == around[last - 2] and around[last - 1] == around[last - 3]
        return same and self.learnt.get(last) == self.learnt.get(last - 2)

    def continued(self, count: int) -> Shape:
        """As if it went on in pairs, to `count` turns."""
        around, learnt = self.around[:-1], dict(self.learnt)
        for turn in range(len(around), count + 1):
            around.append(around[turn - 2])
            if turn - 2 in learnt:
                learnt[turn] = learnt[turn - 2]
        return Shape(around, learnt, foretold=True)

    def rendered(self, texts: Sequence[str]) -> str:
        """What the template makes of them if it does no more than copy."""
        return "".join(_woven(self.around, texts))

    def frame(self, turns: Sequence[int]) -> Frame:
        """With the learnt `turns`."""
        return Frame(tuple(self.around), tuple((turn, *self.learnt[turn]) for turn in turns))


@dataclass(frozen=True, eq=False)
class Frame:
    """What stands around texts, whatever they are: `around` has one more than there are texts. `learnt`: (turn, characters
    before its text that are learnt with it, and behind it), in order."""

    around: tuple[str, ...]
    learnt: tuple[tuple[int, int, int], ...]

    def rendered(self, texts: Sequence[str]) -> str:
        """All of it, with the texts in their places."""
        return "".join(_woven(self.around, texts))

    def spans(self, texts: Sequence[str]) -> tuple[Span, ...]:
        """Where the learnt turns stand in `rendered(texts)`."""
        ends = list(accumulate(map(len, _woven(self.around, texts))))
        return tuple([(ends[2 * turn] - before, ends[2 * turn + 1] + after) for turn, before, after in self.learnt])


def _woven(around: Sequence[str], texts: Sequence[str]) -> list[str]:
    """By turns."""
    parts = [""] * (len(around) + len(texts))
    parts[::2], parts[1::2] = around, texts
    return parts


class Shapes:
    """Of one template. `render` is quick, and wrong where it disagrees with `prove`. `prove(messages)` gives the rendering
    and the spans of its assistant turns, or None where the template does not only append. `source`: the template's own text.
    """

    def __init__(
        self,
        render: Quick,
        prove: Callable[[list[dict[str, Any]]], tuple[str, dict[int, Span]] | None],
        source: str,
    ) -> None:
        self._render = render
        self._prove = prove
        self._minded = minded(source)
        self._marks = {mark[0] for text in self._minded if (mark := _MARK.search(text))}
        self._copies_only = copies_only(source)
        self._known: dict[Roles, Shape | None] = {}
        self._proved: dict[Roles, Shape] = {}
        self._frames: dict[tuple[Roles, tuple[int, ...]], Frame] = {}
        self._proofs = self._uses = 0

    def find(self, messages: Messages, turns: Sequence[int]) -> tuple[str, Frame, tuple[Span, ...]] | None:
        """The text of `messages`, of which the last is learnt, with the spans of the learnt `turns`; or None."""
        texts = [message["content"] for message in messages if len(message) == len(_PLAIN)]
        if len(texts) < len(messages) or not self._copied(texts):
            return None
        roles = tuple([message["role"] for message in messages])
        shape = self._shape(roles)
        if shape is None:
            return None
        frame = self._frame(roles, shape, tuple(turns))
        whole, spans = frame.rendered(texts), frame.spans(texts)
        if not shape.copied:
            if self._render(messages, False) != whole:
                return None
            if shape.foretold and self._render(messages[:-1], True) != whole[: spans[-1][0]]:
                return None
        self._uses += 1
        return whole, frame, spans

    def _frame(self, roles: Roles, shape: Shape, turns: tuple[int, ...]) -> Frame:
        """The same one for the same turns."""
        found = self._frames.get((roles, turns))
        if found is None:
            if len(self._frames) == _KNOWN:
                self._frames.clear()
            found = self._frames[roles, turns] = shape.frame(turns)
        return found

    def foresee(self) -> None:
        """Rows of user and assistant by turns, with and without a system's before."""
        for before in ((), ("system",)):
            for count in range(1, _FORESEEN // 2 + 1):
                if self._shape((*before, *("user", "assistant") * count)) is None:
                    break

    def _copied(self, texts: list[str]) -> bool:
        """Whether nothing suggests that a template does more with the texts than copy them: many trim, some read marks."""
        if "" in texts or [text for text in texts if text.strip() != text]:
            return False
        # No mark reaches from one text into the next. A single character is found much sooner.
        together = "\0".join(texts)
        marked = [mark for mark in self._marks if mark in together]
        return not (marked and any(text in together for text in self._minded))

    def _shape(self, roles: Roles) -> Shape | None:
        if roles not in self._known:
            if self._proofs > _TRIED + self._uses // 4:
                return None
            if len(self._known) == _KNOWN:
                self._known.clear()
                self._proved.clear()
            found = self._beginning(roles) or self._prove_more(roles)
            self._known[roles] = replace(found, copied=self._copies(found, roles)) if found else None
        return self._known[roles]

    def _copies(self, shape: Shape, roles: Roles) -> bool:
        """Whether it is proved that texts of these roles are copied, whatever they are: on some that JSON would not leave as
        they are."""
        if not self._copies_only:
            return False
        texts = [f'Qx{index}"zJ\né' for index in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        whole = shape.rendered(texts)
        if unasked(lambda given: self._render(given, False), messages) != whole:
            return False
        ((start, _),) = shape.frame([len(roles) - 1]).spans(texts)
        return not shape.foretold or unasked(lambda given: self._render(given, True), messages[:-1]) == whole[:start]

    def _beginning(self, roles: Roles) -> Shape | None:
        """Of a proved row, or of one that goes on."""
        count = len(roles)
        for row, shape in self._proved.items():
            if row[:count] == roles:
                return shape.beginning(count)
            if roles[: len(row)] == row and shape.settled and all(roles[i] == roles[i - 2] for i in range(len(row), count)):
                return shape.continued(count).beginning(count)
        return None

    def _prove_more(self, roles: Roles) -> Shape | None:
        """A row goes on with its last two roles, so that others of the same kind need no proof of their own."""
        pairs = max(0, _ROW - len(roles)) // 2
        for row in dict.fromkeys(((roles + roles[-2:] * pairs)[:_ROW], roles[:_ROW])):
            self._proofs += 1
            texts = [f"Qx{index}zJ" for index in range(len(row))]
            messages = [{"role": role, "content": text} for role, text in zip(row, texts, strict=True)]
            found = self._prove(messages)
            if found is not None and self._render(messages, False) == found[0] and (shape := Shape.of(texts, *found)):
                self._proved[row] = shape
                return self._beginning(roles)
        return None


def minded(source: str) -> list[str]:
    """Strings in a template's code, such as </think>, that it may look for in a text."""
    found = {one or other for tag in _TAG.findall(source) for one, other in _STRING.findall(tag)}
    return sorted(text for text in found if len(text) > 1 and _MARK.search(text))
