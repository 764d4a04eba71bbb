"""What is wrong with the data: all of it, of all files, each with its place and what is allowed."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

KEPT: Final = 10_000
"""Problems that are kept word for word; the rest are counted."""
_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True)
class Problem:
    """`path` is the field's, such as messages[2].content; empty when the whole line is meant."""

    file: str
    line: int
    path: str
    seen: str
    allowed: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.path or 'the line'} {self.seen}; allowed: {self.allowed}"


class SampleError(Exception):
    """A sample that cannot be learnt from. The reader of the file adds file and line.

    `more` are further errors of the same sample.
    """

    def __init__(self, path: str, seen: str, allowed: str, more: Sequence[SampleError] = ()) -> None:
        super().__init__(f"{path} {seen}; allowed: {allowed}")
        self.path = path
        self.seen = seen
        self.allowed = allowed
        self.more = more

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str, Sequence[SampleError]]]:
        """From one process to another: an exception's own way knows its message alone."""
        return SampleError, (self.path, self.seen, self.allowed, self.more)

    def at(self, file: str, line: int) -> list[Problem]:
        own = Problem(file, line, self.path, self.seen, self.allowed)
        return [own] + [problem for error in self.more for problem in error.at(file, line)]

    def called(self, names: Mapping[str, str], *, first: bool = False) -> SampleError:
        """The same in the words of the data: `names` maps names in the path, or only its `first`, to theirs."""
        path = re.sub(r"[^.\[\]]+", lambda name: names.get(name[0], name[0]), self.path, count=int(first))
        return SampleError(path, self.seen, self.allowed, [error.called(names, first=first) for error in self.more])

    @classmethod
    def of(cls, errors: Sequence[SampleError]) -> SampleError:
        """One error that stands for all of them."""
        first = errors[0]
        return cls(first.path, first.seen, first.allowed, errors[1:])


@dataclass
class Lines:
    """Which lines of which files, eight bytes a line: there may be as many as samples."""

    by_file: dict[str, array[int]] = field(default_factory=dict)

    def add(self, file: str, line: int) -> None:
        self.by_file.setdefault(file, array("q")).append(line)

    def __len__(self) -> int:
        return sum(len(lines) for lines in self.by_file.values())


@dataclass
class Problems:
    """Collects; keeps the first 10,000 word for word and counts the rest.

    `bad`: the bad samples. `broken`: problems of a whole file or source, which no sample stands for.
    """

    kept: list[Problem] = field(default_factory=list)
    count: int = 0
    bad: Lines = field(default_factory=Lines)
    broken: int = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.kept) < KEPT:
            self.kept.append(problem)

    def add_broken(self, problem: Problem) -> None:
        """A problem that leaving out a sample would not cure."""
        self.broken += 1
        self.add(problem)

    def add_sample(self, error: SampleError, file: str, line: int) -> None:
        """All that is wrong with the sample at `line`."""
        self.bad.add(file, line)
        self.extend(error.at(file, line))

    def extend(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.add(problem)

    def ordered(self) -> list[Problem]:
        """Files in the order they were read, lines in the order they stand: batches find them in another."""
        files = {problem.file: index for index, problem in reversed(list(enumerate(self.kept)))}
        return sorted(self.kept, key=lambda problem: (files[problem.file], problem.line))

    def lines(self) -> list[str]:
        """One line a problem, and one for those that were not kept."""
        more = self.count - len(self.kept)
        return [str(problem) for problem in self.ordered()] + ([f"… and {more} more"] if more else [])

    def summary(self, limit: int) -> str:
        """As many problems as fit `limit` characters, after their number."""
        noun = "problem" if self.count == 1 else "problems"
        text = f"{self.count} {noun} in the data: "
        shown = 0
        for problem in self.ordered():
            line = str(problem)
            if len(text) + len(line) + 40 > limit:
                break
            text += ("; " if shown else "") + line
            shown += 1
        rest = self.count - shown
        return text + (f" … and {rest} more" if rest and shown else "")[:limit]


def show(value: Any) -> str:
    """A value as a person would point at it: JSON, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
