"""All files of a job -> the cache on disk, or every error of every file.

One pass over the bytes; memory holds a batch of samples and eight bytes a document.
"""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents, DocumentWriter, keep
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.files import ENDINGS
from tuneward_trainer.data.problems import Problem, Problems, SampleError
from tuneward_trainer.data.samples import Done, Limits, Source, Worker, batches
from tuneward_trainer.packing import mix

log = logging.getLogger(__name__)

SUMMARY: Final = "summary.json"
ERRORS: Final = "errors.txt"
"""Below the cache: what is wrong with the samples that were left out as invalid; absent where none was."""
_SAY_EVERY: Final = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Summary:
    """What was found. Tokens are those of one epoch, copies counted; samples are counted once. `formats`: by uri."""

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
    formats: dict[str, formats.Format] = field(default_factory=dict)

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
        return cls(**json.loads((folder / SUMMARY).read_text()))


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
    problems, summary = Problems(), Summary()
    tokenizer = _Tokenizer(Worker(encoder, limits), problems, summary)
    hashes = {
        TRAINING: tokenizer.write(folder / TRAINING, training),
        VALIDATION: tokenizer.write(folder / VALIDATION, validation),
    }
    summary.invalid = problems.bad_samples()
    if problems.broken or summary.invalid * 100 > limits.invalid * tokenizer.read:
        raise DataError(problems)
    if problems.count:
        (folder / ERRORS).write_text("".join(f"{line}\n" for line in problems.lines()))
    if limits.fraction:
        hashes = _hold_out(folder, hashes[TRAINING], limits.fraction)
    _count(folder, hashes, summary)
    (folder / SUMMARY).write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


class _Tokenizer:
    """Reads, renders, tokenizes and writes; adds to `problems` and `summary` what it meets."""

    def __init__(self, worker: Worker, problems: Problems, summary: Summary) -> None:
        self._worker = worker
        self._problems = problems
        self._summary = summary
        self._ignored: Counter[str] = Counter()
        self._said = time.monotonic()
        self.read = 0

    def write(self, folder: Path, sources: Sequence[Source]) -> NDArray[np.uint64]:
        """Returns one hash for each document: that of its whole sample, so that equal samples are seen."""
        uris = [uri for source in sources for uri, _ in source.files()]
        hashes = array("Q")
        with DocumentWriter(folder, uris) as writer:
            first = 0
            for source in sources:
                self._source(writer, hashes, source, first)
                first += len(source.files())
        self._summary.ignored_fields = dict(self._ignored)
        return np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)

    def _source(self, writer: DocumentWriter, hashes: array[int], source: Source, first: int) -> None:
        """`first`: index of its first file."""
        read, broken, form = self.read, self._problems.broken, source.detected()
        if form is not None:
            self._summary.formats[source.uri] = form
        for index, (uri, path) in enumerate(source.files(), first):
            for done in self._work(uri, path, form, source):
                for line, documents, digest in done.good:
                    for document in documents:
                        writer.add(document.ids, document.weights, file=index, line=line, copies=source.copies)
                    hashes.extend([digest] * (len(documents) * source.copies))
        if self.read == read and self._problems.broken == broken:
            seen = f"holds no {', '.join(ENDINGS)} file" if source.path.is_dir() else "holds no sample"
            self._problems.add_broken(Problem(source.uri, 0, "the source", seen, "at least one sample"))

    def _work(self, uri: str, path: Path, form: formats.Format | None, source: Source) -> Iterator[Done]:
        """What became of each batch of a file, in order, counted."""
        line = 0
        try:
            for batch in batches(path, form, source.fields):
                line = batch.records[-1][0]
                self.read += len(batch.records)
                done = self._worker(batch)
                self._count(done, uri)
                yield done
        except SampleError as error:  # the file itself is broken after this line
            for problem in error.at(uri, line + 1):
                self._problems.add_broken(problem)

    def _count(self, done: Done, uri: str) -> None:
        for line, error in done.bad:
            self._problems.add_sample(error, uri, line)
        self._ignored.update(done.ignored)
        self._summary.longest = max(self._summary.longest, done.longest)
        for fate, count in done.fates.items():
            setattr(self._summary, fate, getattr(self._summary, fate) + count)
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            log.info("tokenized %d samples, now in %s", self.read, uri)


def _hold_out(folder: Path, hashes: NDArray[np.uint64], fraction: float) -> dict[str, NDArray[np.uint64]]:
    """Moves a share of the training samples to validation: chosen by content, so that neither seed nor order of the
    files matters, and equal samples stay on one side."""
    documents = Documents.open(folder / TRAINING)
    unique = np.unique(hashes)
    wanted = max(1, round(fraction * len(unique)))
    if wanted >= len(unique):
        problem = Problem(
            "spec.datasets", 0, "validationFraction", f"leaves nothing of {len(unique)} different samples", "two or more"
        )
        raise DataError(Problems([problem], 1))
    chosen = unique[np.argsort(mix(unique), kind="stable")[:wanted]]
    held = np.isin(hashes, chosen)
    with DocumentWriter(folder / VALIDATION, documents.sources) as writer:
        kept = []
        for index in np.flatnonzero(held).tolist():
            if not index or documents.start(index) != documents.start(index - 1):  # a copy adds nothing here
                document, (file, line) = documents[index], documents.source(index)
                writer.add(document.ids.tolist(), document.weights.tolist(), file=file, line=line)
                kept.append(hashes[index])
    keep(folder / TRAINING, ~held)
    return {TRAINING: hashes[~held], VALIDATION: np.array(kept, np.uint64)}


def _count(folder: Path, hashes: dict[str, NDArray[np.uint64]], summary: Summary) -> None:
    training, validation = Documents.open(folder / TRAINING), Documents.open(folder / VALIDATION)
    for part, documents in [(TRAINING, training), (VALIDATION, validation)]:
        if not len(documents) and documents.sources:
            problem = Problem(f"spec.datasets.{part}", 0, "the data", "holds no sample that is short enough", "at least one")
            raise DataError(Problems([problem], 1))
    samples = _samples(training)
    summary.samples = len(samples)
    summary.documents = len(training)
    summary.tokens, summary.target_tokens = training.tokens(), training.target_tokens()
    summary.validation_samples = len(_samples(validation))
    summary.duplicates = len(samples) - len(np.unique(hashes[TRAINING]))
    summary.in_both = int(np.isin(np.unique(hashes[VALIDATION]), hashes[TRAINING]).sum())


def _samples(documents: Documents) -> NDArray[Any]:
    """One entry for each line of a source that gave documents."""
    return np.unique(documents.places(), axis=0)
