"""What `validate` found, as lines for people and as one JSON object for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.quantities import duration, operations
from tuneward_api.resolved import ResolvedHyperparameters
from tuneward_trainer.data import show
from tuneward_trainer.data.corrected import Corrected
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.data.fit import Fate
from tuneward_trainer.data.gathered import Gathered, SourceCounts
from tuneward_trainer.data.overlap import Overlap, duplicates, leaks
from tuneward_trainer.data.problems import Lines
from tuneward_trainer.data.show import Shown

PRINTED: Final = 100
"""Problems, duplicates and leaks that are printed; JSON has the first 10,000."""
_KEPT: Final = 10_000
_RANGES: Final = 20
"""Line numbers and ranges that are printed for a file."""
_BAR: Final = 40
_FATES: Final[dict[Fate, str]] = {
    "split": "too long and split",
    "truncated": "too long and cut at the end",
    "skipped": "too long and left out",
}


@dataclass(frozen=True)
class Findings:
    """`numbers`: what the job will use, None where no training sample is good; `time`: what its steps take (estimate)."""

    gathered: Gathered
    training: Documents
    validation: Documents
    numbers: ResolvedHyperparameters | None
    time: Mapping[str, Any] | None
    shown: Sequence[Shown] = ()
    corrected: Sequence[Corrected] = field(default_factory=tuple)

    @property
    def valid(self) -> bool:
        return not self.gathered.refused

    def to_json(self) -> dict[str, Any]:
        summary, problems = self.gathered.summary, self.gathered.problems
        return {
            "valid": self.valid,
            "problemCount": problems.count,
            "problems": [
                {
                    "file": problem.file,
                    "line": problem.line,
                    "field": problem.path,
                    "message": f"{problem.seen}; allowed: {problem.allowed}",
                }
                for problem in problems.ordered()
            ],
            "samples": summary.samples,
            "documents": summary.documents,
            "tokens": summary.tokens,
            "targetTokens": summary.target_tokens,
            "validationSamples": summary.validation_samples,
            "sources": [_source_json(counts) for counts in summary.sources],
            "lengths": [{"upTo": bound, "documents": count} for bound, count in histogram(self.training.lengths)],
            "duplicates": _overlap_json(duplicates(self.training)),
            "leaks": _overlap_json(leaks(self.training, self.validation)),
            **{fate: _lines_json(self.gathered.fates.get(fate, Lines())) for fate in _FATES},
            "invalid": _lines_json(problems.bad),
            "ignoredFields": summary.ignored_fields,
            "job": _numbers_json(self.numbers),
            "time": self.time,
            "shown": [_shown_json(one) for one in self.shown],
            "corrected": [_corrected_json(one) for one in self.corrected],
        }

    def lines(self, *, colour: bool) -> Iterator[str]:
        yield from self._complaints()
        yield from self._table()
        if len(self.training):
            yield "tokens of a document:"
            yield from bars(self.training.lengths)
        yield from _told("more than once", duplicates(self.training))
        yield from _told("validation that is trained on, so that its loss flatters", leaks(self.training, self.validation))
        for fate, text in _FATES.items():
            yield from _placed(text, self.gathered.fates.get(fate, Lines()))
        if self.valid:
            yield from _placed("invalid and left out", self.gathered.problems.bad)
        for name, count in self.gathered.summary.ignored_fields.items():
            yield f"field {name}, which is ignored: {_samples(count)}"
        yield from self._numbers()
        for one in self.shown:
            yield from _shown(one, colour=colour)
        for file in self.corrected:
            yield from _corrected(file)

    def _complaints(self) -> Iterator[str]:
        problems = self.gathered.problems
        if not problems.count:
            return
        lines = [str(problem) for problem in problems.ordered()[:PRINTED]]
        yield from lines
        if problems.count > len(lines):
            yield f"… and {problems.count - len(lines)} more"
        yield _counted(problems.count, "problem")

    def _table(self) -> Iterator[str]:
        summary = self.gathered.summary
        rows = [_row(counts) for counts in summary.sources if counts.part == TRAINING or counts.samples or counts.invalid]
        total = SourceCounts(
            "together", TRAINING, 0, None, summary.samples, summary.documents, summary.tokens, summary.target_tokens
        )
        if sum(counts.part == TRAINING for counts in summary.sources) > 1:
            rows.append(_row(total))
        yield from aligned([_HEAD, *rows])

    def _numbers(self) -> Iterator[str]:
        if self.numbers is None:
            return
        numbers = self.numbers
        which = "the job will take" if self.valid else "with the good samples alone the job would take"
        steps, epochs = _counted(numbers.steps, "step"), _counted(numbers.epochs, "epoch")
        yield (
            f"{which} {steps} ({epochs}) of about {numbers.batch_tokens:,} tokens (batchTokens), "
            f"in rows of {numbers.sequence_length:,} (sequenceLength)"
        )
        if self.time is not None:
            yield _time_line(self.time)


_HEAD: Final = ("source", "", "samples", "documents", "tokens", "learnt", "share")


def _row(counts: SourceCounts) -> tuple[str, ...]:
    share = f"{counts.target_tokens / counts.tokens:.1%}" if counts.tokens else "-"
    kind = ", ".join(filter(None, (counts.format, VALIDATION if counts.part == VALIDATION else None)))
    numbers = (counts.samples, counts.documents, counts.tokens, counts.target_tokens)
    return (counts.uri, kind, *(f"{number:,}" for number in numbers), share)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of one width: two of words, and numbers at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{'<' if place < 2 else '>'}{widths[place]}}" for place, cell in enumerate(row)]
        yield "  ".join(cell for cell, width in zip(cells, widths, strict=True) if width).rstrip()


def histogram(lengths: NDArray[np.int32]) -> list[tuple[int, int]]:
    """(power of two, documents of at most so many tokens and more than the half) for each that occurs."""
    if not len(lengths):
        return []
    bounds = 1 << np.arange(int(lengths.max()).bit_length() + 1)
    counts = np.histogram(lengths, np.concatenate([[0], bounds + 1]))[0]
    return [(bound, count) for bound, count in zip(bounds.tolist(), counts.tolist(), strict=True) if count]


def bars(lengths: NDArray[np.int32]) -> Iterator[str]:
    found = histogram(lengths)
    most = max(count for _, count in found)
    for bound, count in found:
        yield f"  up to {bound:>7,} {count:>9,} {'#' * max(1, round(_BAR * count / most))}"


def _counted(count: float, noun: str) -> str:
    number = f"{int(count):,}" if count == int(count) else f"{count:g}"
    return f"{number} {noun}" + ("" if count == 1 else "s")


def _samples(count: int) -> str:
    return _counted(count, "sample")


def _told(text: str, overlap: Overlap) -> Iterator[str]:
    if not overlap:
        return
    yield f"{text}: {_samples(len(overlap))}"
    for (file, line), (other, at) in overlap.places(PRINTED):
        yield f"  {file}:{line} is the same as {other}:{at}"
    if len(overlap) > PRINTED:
        yield f"  … and {len(overlap) - PRINTED:,} more"


def _placed(text: str, lines: Lines) -> Iterator[str]:
    if lines:
        yield f"{text}: {_samples(len(lines))}"
        yield from (f"  {file}: {ranges(numbers)}" for file, numbers in lines.by_file.items())


def ranges(numbers: Sequence[int]) -> str:
    """`line 3`, `lines 3, 7-9, 12`, and how many ranges more."""
    ordered = sorted(set(numbers))
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(ordered), 1) if b != a + 1), len(ordered)]
    spans = [(ordered[a], ordered[b - 1]) for a, b in pairwise(starts)]
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans[:_RANGES])
    more = sum(b - a + 1 for a, b in spans[_RANGES:])
    return f"{'line' if len(ordered) == 1 else 'lines'} {text}" + (f" and {more:,} more" if more else "")


def _shown(one: Shown, *, colour: bool) -> Iterator[str]:
    for number, (document, tokens) in enumerate(zip(one.documents, one.tokens, strict=True), 1):
        which = f", document {number} of {len(one.documents)}" if len(one.documents) > 1 else ""
        weights = document.weights.tolist()
        learnt = len(weights) - weights.count(0.0)
        yield f"{one.file}:{one.line}{which}: {len(document)} tokens, {learnt} learnt"
        yield show.text_of(tokens, weights, colour=colour)


def _corrected(one: Corrected) -> Iterator[str]:
    left = f"; left out {len(one.left_out):,}: {ranges(one.left_out)}" if one.left_out else ""
    yield f"{one.path}: {_samples(one.samples)} of {one.file}{left}" if one.path else f"{one.file} has no good sample{left}"


def _time_line(time: Mapping[str, Any]) -> str:
    if time["seconds"] is None:
        return f"its training is {operations(time['flops'])}; the time is {time['rateSource']}"
    rate = operations(time["flopsPerSecond"])
    return f"its training will take about {duration(time['seconds'])} at {rate}/s ({time['rateSource']})"


def _source_json(counts: SourceCounts) -> dict[str, Any]:
    return {
        "uri": counts.uri,
        "part": counts.part,
        "format": counts.format,
        "files": counts.files,
        "samples": counts.samples,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "targetTokens": counts.target_tokens,
        "split": counts.split,
        "truncated": counts.truncated,
        "skipped": counts.skipped,
        "invalid": counts.invalid,
    }


def _overlap_json(overlap: Overlap) -> dict[str, Any]:
    found = [
        {"file": file, "line": line, "sameAs": {"file": other, "line": at}}
        for (file, line), (other, at) in overlap.places(_KEPT)
    ]
    return {"count": len(overlap), "places": found}


def _lines_json(lines: Lines) -> dict[str, Any]:
    return {
        "count": len(lines),
        "lines": {file: sorted(set(numbers))[:_KEPT] for file, numbers in lines.by_file.items()},
    }


def _numbers_json(numbers: ResolvedHyperparameters | None) -> Mapping[str, Any] | None:
    return numbers.to_json() if numbers is not None else None


def _shown_json(one: Shown) -> dict[str, Any]:
    return {
        "file": one.file,
        "line": one.line,
        "documents": [
            {"ids": document.ids.tolist(), "tokens": tokens, "weights": document.weights.tolist()}
            for document, tokens in zip(one.documents, one.tokens, strict=True)
        ],
    }


def _corrected_json(one: Corrected) -> dict[str, Any]:
    return {
        "file": one.file,
        "path": str(one.path) if one.path else None,
        "samples": one.samples,
        "leftOut": one.left_out,
    }
