"""All files of a job -> the cache on disk, or every error of every file.

One pass over the bytes; memory holds a batch of samples, and some numbers a sample, whatever its length.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np

from tuneward_trainer.data import formats
from tuneward_trainer.data.crew import WORTH, Crew, crew
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents, DocumentWriter, keep
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.files import ENDINGS
from tuneward_trainer.data.fit import Fate
from tuneward_trainer.data.overlap import duplicates, leaks
from tuneward_trainer.data.problems import Lines, Problem, Problems, SampleError
from tuneward_trainer.data.samples import Done, Limits, Source, Worker, batches
from tuneward_trainer.machine import processors
from tuneward_trainer.packing import mix

log = logging.getLogger(__name__)

Part: TypeAlias = Literal["training", "validation"]
SUMMARY: Final = "summary.json"
ERRORS: Final = "errors.txt"
"""Below the cache: what is wrong with the samples that were left out as invalid; absent where none was."""
_SAY_EVERY: Final = 10.0
"""Seconds between two lines of progress."""


@dataclass
class SourceCounts:
    """What one source gives to a part. Tokens are those of one epoch, copies counted; samples are counted once."""

    uri: str
    part: Part
    files: int = 1
    format: formats.Format | None = None
    samples: int = 0
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    split: int = 0
    truncated: int = 0
    skipped: int = 0
    invalid: int = 0


@dataclass
class Summary:
    """What was found, in all and by source; counted as SourceCounts are."""

    samples: int = 0
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    validation_samples: int = 0
    longest: int = 0
    duplicates: int = 0
    in_both: int = 0
    split: int = 0
    truncated: int = 0
    skipped: int = 0
    invalid: int = 0
    ignored_fields: dict[str, int] = field(default_factory=dict)
    sources: list[SourceCounts] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What is no error but worth a line."""
        found = [
            (self.duplicates, "samples occur more than once"),
            (self.in_both, "validation samples are training samples too: the validation loss flatters"),
            (self.split, "samples were split, as they are longer than sequenceLength"),
            (self.truncated, "samples were cut at their end"),
            (self.skipped, "samples were left out as too long"),
            (self.invalid, "samples were left out as invalid (invalidSampleSkipPercentage); errors.txt names them"),
        ]
        fields = [(count, f"samples have the field {name}, which is ignored") for name, count in self.ignored_fields.items()]
        return [f"{count} {text}" for count, text in found + fields if count]

    @classmethod
    def read(cls, folder: Path) -> Summary:
        found = json.loads((folder / SUMMARY).read_text())
        return cls(**{**found, "sources": [SourceCounts(**counts) for counts in found["sources"]]})


@dataclass
class Gathered:
    """What a pass over all files found, good and bad. `read`: lines; `fates`: samples that were too long."""

    problems: Problems = field(default_factory=Problems)
    summary: Summary = field(default_factory=Summary)
    fates: dict[Fate, Lines] = field(default_factory=dict)
    read: int = 0
    skip_percentage: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether there is more wrong than may be left out."""
        return bool(self.problems.broken) or len(self.problems.bad) * 100 > self.skip_percentage * self.read

    def add_unless_refused(self, problem: Problem) -> None:
        """What may only follow from other problems is said where there are none."""
        if not self.refused:
            self.problems.add_broken(problem)


class DataError(Exception):
    """The data cannot be learnt from; `problems` says all of why."""

    def __init__(self, problems: Problems) -> None:
        super().__init__(problems.summary(1000))
        self.problems = problems


def build(
    folder: Path, *, training: Sequence[Source], validation: Sequence[Source], encoder: Encoder, limits: Limits
) -> Summary:
    """Writes both parts and summary.json below `folder`, and errors.txt where invalid samples were left out.

    Raises DataError with the problems of all files.
    """
    found = gather(folder, training=training, validation=validation, encoder=encoder, limits=limits)
    if found.refused:
        raise DataError(found.problems)
    if found.problems.count:
        (folder / ERRORS).write_text("".join(f"{line}\n" for line in found.problems.lines()))
    (folder / SUMMARY).write_text(json.dumps(asdict(found.summary), indent=1) + "\n")
    return found.summary


def gather(
    folder: Path,
    *,
    training: Sequence[Source],
    validation: Sequence[Source],
    encoder: Encoder,
    limits: Limits,
    keep_tokens: bool = True,
) -> Gathered:
    """Writes both parts of the good samples below `folder`, whatever is wrong with others."""
    found = Gathered(skip_percentage=limits.invalid)
    with crew(Worker(encoder, limits), _processes([*training, *validation])) as workers:
        reader = _Reader(workers, found, keep_tokens=keep_tokens)
        reader.write(folder, TRAINING, training)
        reader.write(folder, VALIDATION, validation)
    if limits.fraction:
        _hold_out(folder, limits.fraction, found, keep_tokens=keep_tokens)
    _count(folder, found, held_out=bool(limits.fraction))
    return found


def _processes(sources: Sequence[Source]) -> int:
    size = sum(path.stat().st_size for source in sources for _, path in source.files())
    return processors() if size >= WORTH else 1


class _Reader:
    """Reads, renders, tokenizes and writes; adds to `found` what it meets."""

    def __init__(self, workers: Crew, found: Gathered, *, keep_tokens: bool) -> None:
        self._workers = workers
        self._found = found
        self._keep_tokens = keep_tokens
        self._ignored: Counter[str] = Counter()
        self._said = time.monotonic()

    def write(self, folder: Path, part: Part, sources: Sequence[Source]) -> None:
        uris = [uri for source in sources for uri, _ in source.files()]
        with DocumentWriter(folder / part, uris, keep_tokens=self._keep_tokens) as writer:
            first = 0
            for source in sources:
                counts = SourceCounts(source.uri, part, len(source.files()), source.detected())
                self._found.summary.sources.append(counts)
                self._source(writer, source, counts, first)
                first += counts.files
        self._found.summary.ignored_fields = dict(self._ignored)

    def _source(self, writer: DocumentWriter, source: Source, counts: SourceCounts, first: int) -> None:
        """`first`: index of its first file."""
        problems = self._found.problems
        read, broken = self._found.read, problems.broken
        for index, (uri, path) in enumerate(source.files(), first):
            for done in self._work(uri, path, source, counts):
                for line, documents, digest in done.good:
                    parts = [(document.ids, document.weights) for document in documents]
                    writer.add_sample(parts, file=index, line=line, copies=source.copies, digest=digest)
        if self._found.read == read and problems.broken == broken:
            seen = f"holds no {', '.join(ENDINGS)} file" if source.path.is_dir() else "holds no sample"
            problems.add_broken(Problem(source.uri, 0, "the source", seen, "at least one sample"))

    def _work(self, uri: str, path: Path, source: Source, counts: SourceCounts) -> Iterator[Done]:
        """What became of each batch of a file, in order, counted."""
        line = 0
        try:
            for batch, done in self._workers.work(batches(path, counts.format, source.fields)):
                line = batch.records[-1][0]
                self._found.read += len(batch.records)
                self._note(done, uri, counts)
                yield done
        except SampleError as error:  # the file itself is broken after this line
            for problem in error.at(uri, line + 1):
                self._found.problems.add_broken(problem)

    def _note(self, done: Done, uri: str, counts: SourceCounts) -> None:
        found = self._found
        counts.invalid += len(done.bad)
        for line, error in done.bad:
            found.problems.add_sample(error, uri, line)
        for line, fate in done.fates:
            found.fates.setdefault(fate, Lines()).add(uri, line)
            setattr(counts, fate, getattr(counts, fate) + 1)
        self._ignored.update(done.ignored)
        found.summary.longest = max(found.summary.longest, done.longest)
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            log.info("tokenized %d samples, now in %s", found.read, uri)


def _hold_out(folder: Path, fraction: float, found: Gathered, *, keep_tokens: bool) -> None:
    """Moves a share of the training samples to validation: chosen by content, so that neither seed nor order of the
    files matters, and equal samples stay on one side."""
    documents = Documents.open(folder / TRAINING)
    unique = np.unique(documents.digests)
    wanted = max(1, round(fraction * len(unique)))
    if wanted >= len(unique):
        seen = f"leaves nothing of {len(unique)} different samples"
        found.add_unless_refused(Problem("spec.datasets", 0, "validationFraction", seen, "two or more"))
        return
    held = np.isin(documents.digests, unique[np.argsort(mix(unique), kind="stable")[:wanted]])
    with DocumentWriter(folder / VALIDATION, documents.sources, keep_tokens=keep_tokens) as writer:
        originals, _ = documents.originals()  # a copy adds nothing here
        for index in originals[held[originals]].tolist():
            writer.copy(documents, index)
    keep(folder / TRAINING, ~held)


def _count(folder: Path, found: Gathered, *, held_out: bool) -> None:
    training, validation = Documents.open(folder / TRAINING), Documents.open(folder / VALIDATION)
    summary = found.summary
    sources = [counts for counts in summary.sources if counts.part == TRAINING]
    if held_out:
        summary.sources += [SourceCounts(counts.uri, VALIDATION, counts.files, counts.format) for counts in sources]
    for part, documents in ((TRAINING, training), (VALIDATION, validation)):
        _count_sources(documents, [counts for counts in summary.sources if counts.part == part])
        if not len(documents) and documents.sources:
            seen = "holds no sample that is short enough"
            found.add_unless_refused(Problem(f"spec.datasets.{part}", 0, "the data", seen, "at least one"))
    for total in ("samples", "documents", "tokens", "target_tokens"):
        setattr(summary, total, sum(getattr(counts, total) for counts in sources))
    for total in ("split", "truncated", "skipped", "invalid"):
        setattr(summary, total, sum(getattr(counts, total) for counts in summary.sources))
    summary.validation_samples = len(validation.samples())
    summary.duplicates, summary.in_both = len(duplicates(training)), len(leaks(training, validation))


def _count_sources(documents: Documents, sources: Sequence[SourceCounts]) -> None:
    """`sources` in the order of their files."""
    first_files = np.cumsum([0, *(counts.files for counts in sources)])[:-1]
    owner = np.searchsorted(first_files, documents.files, side="right") - 1
    columns = (
        np.bincount(owner[documents.samples()], minlength=len(sources)),
        np.bincount(owner, minlength=len(sources)),
        np.bincount(owner, documents.lengths, minlength=len(sources)),
        np.bincount(owner, documents.targets, minlength=len(sources)),
    )
    for counts, found in zip(sources, zip(*columns, strict=True), strict=True):
        counts.samples, counts.documents, counts.tokens, counts.target_tokens = map(int, found)
