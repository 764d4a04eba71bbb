"""All files of a job -> the cache on disk, or every error of every file.

One pass over the bytes; memory holds a batch of samples and eight bytes a document.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.objective import ObjectiveType
from tuneward_trainer.data import fit, formats
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents, DocumentWriter, keep
from tuneward_trainer.data.encode import Encoded, Encoder
from tuneward_trainer.data.files import data_files, parse, read_lines
from tuneward_trainer.data.problems import Problem, Problems, SampleError
from tuneward_trainer.packing import mix

log = logging.getLogger(__name__)

SUMMARY: Final = "summary.json"
_BATCH: Final = 512
_SAY_EVERY: Final = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Source:
    """One entry of spec.datasets: `path` is the file or folder that `uri` names."""

    uri: str
    path: Path
    format: formats.Format | None = None
    copies: int = 1

    def files(self) -> list[tuple[str, Path]]:
        """(address, path) of each file."""
        if not self.path.is_dir():
            return [(self.uri, self.path)]
        return [(f"{self.uri.rstrip('/')}/{file.name}", file) for file in data_files(self.path)]


@dataclass(frozen=True)
class Limits:
    """`longest`: tokens of a sample; `fraction`: share of the training samples to hold out."""

    longest: int
    on_too_long: fit.OnTooLong = "Error"
    fraction: float = 0.0
    objective: ObjectiveType = "SFT"


@dataclass
class Summary:
    """What was found. Tokens are those of one epoch, copies counted; samples are counted once."""

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
    ignored_fields: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What is no error but worth a line."""
        found = [
            (self.duplicates, "samples occur more than once"),
            (self.in_both, "validation samples are training samples too: the validation loss flatters"),
            (self.split, "samples were split, as they are longer than sequenceLength"),
            (self.truncated, "samples were cut at their end"),
            (self.skipped, "samples were left out as too long"),
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
    """Writes both parts and summary.json below `folder`. Raises DataError with the problems of all files."""
    problems, summary = Problems(), Summary()
    tokenizer = _Tokenizer(encoder, limits, problems, summary)
    hashes = {
        TRAINING: tokenizer.write(folder / TRAINING, training),
        VALIDATION: tokenizer.write(folder / VALIDATION, validation),
    }
    if problems.count:
        raise DataError(problems)
    if limits.fraction:
        hashes = _hold_out(folder, hashes[TRAINING], limits.fraction)
    _count(folder, hashes, summary)
    (folder / SUMMARY).write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


class _Tokenizer:
    """Reads, renders, tokenizes and writes; adds to `problems` and `summary` what it meets."""

    def __init__(self, encoder: Encoder, limits: Limits, problems: Problems, summary: Summary) -> None:
        self._encoder = encoder
        self._limits = limits
        self._problems = problems
        self._summary = summary
        self._ignored: Counter[str] = Counter()
        self._said = time.monotonic()
        self._read = 0

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
        """`first`: index of its first file. The format of a source is that of its first sample."""
        before, form = self._read, source.format
        for index, (uri, path) in enumerate(source.files(), first):
            samples = self._samples(uri, path, form)
            while batch := list(islice(samples, _BATCH)):
                form = batch[0][2]
                for line, documents in self._documents(uri, batch):
                    for document in documents:
                        writer.add(document.ids, document.weights, file=index, line=line, copies=source.copies)
                    hashes.extend([_hash(documents)] * (len(documents) * source.copies))
                self._say(uri)
        if self._read == before:
            seen = "holds no .jsonl or .jsonl.gz file" if source.path.is_dir() else "holds no sample"
            self._problems.add(Problem(source.uri, 0, "the source", seen, "at least one sample"))

    def _documents(
        self, uri: str, batch: list[tuple[int, formats.Sample, formats.Format]]
    ) -> Iterator[tuple[int, list[Encoded]]]:
        """(line, its documents) of each good sample; the others become problems."""
        encoded = self._encoder.encode([sample for _, sample, _ in batch])
        for (line, _, form), found in zip(batch, encoded, strict=True):
            try:
                if documents := self._fit(found, form):
                    yield line, documents
            except SampleError as error:
                self._problems.extend(error.at(uri, line))

    def _samples(
        self, uri: str, path: Path, form: formats.Format | None
    ) -> Iterator[tuple[int, formats.Sample, formats.Format]]:
        """(line, sample, format) of each good line; the others become problems."""
        line = 0
        try:
            for line, content in read_lines(path):
                self._read += 1
                try:
                    value = parse(content)
                    form = form or formats.detect(value)
                    fit.check_format(form, self._limits.objective)
                    self._ignored.update(formats.ignored(value, form))
                    yield line, formats.read(value, form), form
                except SampleError as error:
                    self._problems.extend(error.at(uri, line))
        except SampleError as error:  # the file itself is broken after this line
            self._read += 1
            self._problems.extend(error.at(uri, line + 1))

    def _fit(self, found: list[Encoded] | SampleError, form: formats.Format) -> list[Encoded]:
        """What is learnt of a sample that is short enough, or of what is left of it. Raises SampleError."""
        if isinstance(found, SampleError):
            raise found
        self._summary.longest = max(self._summary.longest, *(min(len(one.ids), self._limits.longest) for one in found))
        fitted = fit.fit(found, self._limits.longest, self._limits.on_too_long, form)
        for what in fitted.done:
            setattr(self._summary, what, getattr(self._summary, what) + 1)
        return fitted.documents

    def _say(self, uri: str) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            log.info("tokenized %d samples, now in %s", self._read, uri)


def _hash(documents: list[Encoded]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        digest.update(array("i", document.ids).tobytes() + bytes(bool(weight) for weight in document.weights) + b"|")
    return int.from_bytes(digest.digest(), "little")


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
