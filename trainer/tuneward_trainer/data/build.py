"""All files of a job -> the cache on disk, or every error of every file.

One pass over the bytes; memory holds a batch of samples, and some numbers a sample, whatever its length.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np

from tuneward_trainer.data import journal
from tuneward_trainer.data.crew import WORTH, Crew, crew
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents, DocumentWriter, keep
from tuneward_trainer.data.earlier import Earlier, let_find
from tuneward_trainer.data.encode import SampleEncoder
from tuneward_trainer.data.files import ENDINGS
from tuneward_trainer.data.gathered import SUMMARY, Gathered, Part, SourceCounts, Summary
from tuneward_trainer.data.journal import Reached
from tuneward_trainer.data.overlap import duplicates, leaks
from tuneward_trainer.data.problems import Lines, Problem, Problems, SampleError
from tuneward_trainer.data.samples import Done, Limits, Source, Worker, batches
from tuneward_trainer.machine import processors
from tuneward_trainer.packing import mix

log = logging.getLogger(__name__)

ERRORS: Final = "errors.txt"
"""Below the cache: what is wrong with the samples that were left out as invalid; absent where none was."""
_SAY_EVERY: Final = 10.0
"""Seconds between two lines of progress."""
_SAVE_EVERY: Final = 30.0
"""Seconds of work that a kill may cost."""


class DataError(Exception):
    """The data cannot be learnt from; `problems` says all of why."""

    def __init__(self, problems: Problems) -> None:
        super().__init__(problems.summary(1000))
        self.problems = problems


def build(
    folder: Path,
    *,
    training: Sequence[Source],
    validation: Sequence[Source],
    encoder: SampleEncoder,
    limits: Limits,
    earlier: Earlier | None = None,
) -> Summary:
    """Writes both parts and summary.json below `folder`, and errors.txt where invalid samples were left out. What `earlier`
    caches of the same encoder hold is copied.

    Raises DataError with the problems of all files.
    """
    found = gather(folder, training=training, validation=validation, encoder=encoder, limits=limits, earlier=earlier)
    if found.refused:
        raise DataError(found.problems)
    for part in (TRAINING, VALIDATION):
        let_find(folder / part)
    if found.problems.count:
        (folder / ERRORS).write_text("".join(f"{line}\n" for line in found.problems.lines()))
    (folder / SUMMARY).write_text(json.dumps(asdict(found.summary), indent=1) + "\n")
    return found.summary


def gather(
    folder: Path,
    *,
    training: Sequence[Source],
    validation: Sequence[Source],
    encoder: SampleEncoder,
    limits: Limits,
    keep_tokens: bool = True,
    earlier: Earlier | None = None,
) -> Gathered:
    """Writes both parts of the good samples below `folder`, whatever is wrong with others."""
    found = Gathered(skip_percentage=limits.invalid)
    reached = journal.load(folder, found) if keep_tokens else None
    with crew(Worker(encoder, limits, earlier), _processes([*training, *validation])) as workers:
        reader = _Reader(folder, workers, found, keep_tokens=keep_tokens)
        if reached is None or reached.part == TRAINING:
            reader.write(TRAINING, training, reached)
        reader.write(VALIDATION, validation, reached if reached is not None and reached.part == VALIDATION else None)
    journal.remove(folder)
    if limits.fraction:
        _hold_out(folder, limits.fraction, found, keep_tokens=keep_tokens)
    _count(folder, found, held_out=bool(limits.fraction))
    return found


def _processes(sources: Sequence[Source]) -> int:
    size = sum(path.stat().st_size for source in sources for _, path in source.files())
    return processors() if size >= WORTH else 1


class _Reader:
    """Reads, renders, tokenizes and writes; adds to `found` what it meets."""

    def __init__(self, folder: Path, workers: Crew, found: Gathered, *, keep_tokens: bool) -> None:
        self._folder = folder
        self._workers = workers
        self._found = found
        self._keep_tokens = keep_tokens
        self._said = self._saved = time.monotonic()

    def write(self, part: Part, sources: Sequence[Source], reached: Reached | None) -> None:
        """From the first source on, or from where an earlier process came to."""
        uris = [uri for source in sources for uri, _ in source.files()]
        sizes = reached.sizes if reached is not None else None
        with DocumentWriter(self._folder / part, uris, keep_tokens=self._keep_tokens, sizes=sizes) as writer:
            place = Reached(part, 0, 0, 0)
            for number, source in enumerate(sources):
                files = len(source.files())
                if reached is None or number > reached.source:
                    counts = SourceCounts(source.uri, part, files, source.detected())
                    self._found.summary.sources.append(counts)
                    self._source(writer, source, counts, replace(place, source=number))
                elif number == reached.source:
                    self._source(writer, source, self._found.summary.sources[-1], place, reached)
                place = replace(place, file=place.file + files)
            if self._keep_tokens:
                writer.sync()  # a journal that is written later counts on it

    def _source(
        self, writer: DocumentWriter, source: Source, counts: SourceCounts, place: Reached, reached: Reached | None = None
    ) -> None:
        """`place`: its first file; `reached`: the line of one of its files, up to which all is written."""
        problems = self._found.problems
        read, broken = self._found.read, problems.broken
        for index, (uri, path) in enumerate(source.files(), place.file):
            if reached is not None and index < reached.file:
                continue
            after = reached.line if reached is not None and index == reached.file else 0
            for line, done in self._work(uri, path, source, counts, after):
                for good in done.good:
                    writer.add_sample(
                        good.documents,
                        file=index,
                        line=good.line,
                        copies=source.copies,
                        digest=good.digest,
                        address=good.address,
                    )
                self._save(writer, replace(reached or place, file=index, line=line))
        if self._found.read == read and problems.broken == broken and reached is None:
            seen = f"holds no {', '.join(ENDINGS)} file" if source.path.is_dir() else "holds no sample"
            problems.add_broken(Problem(source.uri, 0, "the source", seen, "at least one sample"))

    def _save(self, writer: DocumentWriter, place: Reached) -> None:
        if self._keep_tokens and time.monotonic() - self._saved >= _SAVE_EVERY:
            journal.save(self._folder, replace(place, sizes=writer.sync()), self._found)
            self._saved = time.monotonic()

    def _work(self, uri: str, path: Path, source: Source, counts: SourceCounts, after: int) -> Iterator[tuple[int, Done]]:
        """(last line, what became of it) of each batch of a file behind a line, in order, counted."""
        line = after
        try:
            for batch, done in self._workers.work(batches(path, counts.format, source.fields, after=after)):
                line = batch.records[-1][0]
                self._found.read += len(batch.records)
                self._note(done, uri, counts)
                yield line, done
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
        for name, count in done.ignored.items():
            found.summary.ignored_fields[name] = found.summary.ignored_fields.get(name, 0) + count
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
