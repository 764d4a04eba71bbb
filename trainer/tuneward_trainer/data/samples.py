"""Batches of lines -> documents: what every sample goes through, in whatever process.

A batch carries what its lines need, and what comes back holds no reference to it: build.py hands batches to as many
workers as it likes and writes what they return in the order of the files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from tuneward_api.objective import PAIRS, ObjectiveType
from tuneward_trainer.data import fit, formats, pairs
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.earlier import NOWHERE, Address, Addresses, Earlier
from tuneward_trainer.data.encode import SampleEncoder
from tuneward_trainer.data.files import data_files, parse, read
from tuneward_trainer.data.problems import SampleError

Record: TypeAlias = tuple[int, bytes | dict[str, Any]]
"""(line or row from 1, what stands there)."""
_RECORDS: Final = 512
_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Source:
    """One entry of spec.datasets: `path` is the file or folder that `uri` names; `fields` its columns' names to ours."""

    uri: str
    path: Path
    format: formats.Format | None = None
    copies: int = 1
    fields: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> list[tuple[str, Path]]:
        """(address, path) of each file."""
        if not self.path.is_dir():
            return [(self.uri, self.path)]
        return [(f"{self.uri.rstrip('/')}/{file.name}", file) for file in data_files(self.path)]

    def detected(self) -> formats.Format | None:
        """Its format: the one that was asked for, or that of the first sample that has one."""
        if self.format is not None:
            return self.format
        for _, path in self.files():
            try:
                for _, content in read(path):
                    try:
                        return formats.detect(formats.renamed(parse(content), self.fields))
                    except SampleError:
                        continue
            except SampleError:
                continue
        return None


@dataclass(frozen=True)
class Limits:
    """`longest`: tokens of a sample; `fraction`: share of the training samples to hold out; `invalid`: share of all
    samples, in percent, that may be left out as invalid; `most`: tokens that the model was made for, if it says so."""

    longest: int
    on_too_long: fit.OnTooLong = "Error"
    fraction: float = 0.0
    invalid: float = 0.0
    objective: ObjectiveType = "SFT"
    most: int | None = None


@dataclass(frozen=True)
class Batch:
    """Some lines of one file, in order."""

    records: list[Record]
    format: formats.Format | None
    fields: Mapping[str, str]


class Good(NamedTuple):
    """The documents of the sample in a line; `digest`: of their tokens; `address`: of what stands there."""

    line: int
    documents: list[Encoded]
    digest: int
    address: Address


@dataclass
class Done:
    """What became of a batch: the samples that are `good`, `bad` (line, what is wrong), `fates` (line, what was done with a
    sample that was too long)."""

    good: list[Good] = field(default_factory=list)
    bad: list[tuple[int, SampleError]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    fates: list[tuple[int, fit.Fate]] = field(default_factory=list)


def batches(path: Path, form: formats.Format | None, fields: Mapping[str, str], *, after: int = 0) -> Iterator[Batch]:
    """A file from behind a line on, in pieces of some hundred lines or a megabyte. Raises SampleError where the file itself
    is broken, after all that stands before."""
    records: list[Record] = []
    size = 0
    try:
        for line, content in read(path):
            if line <= after:
                continue
            records.append((line, content))
            size += len(content) if isinstance(content, bytes) else 0
            if len(records) == _RECORDS or size > _BYTES:
                yield Batch(records, form, fields)
                records, size = [], 0
    except SampleError:
        if records:
            yield Batch(records, form, fields)
        raise
    if records:
        yield Batch(records, form, fields)


class Worker:
    """Reads, renders and tokenizes one batch after the other; what `earlier` caches hold is read only."""

    def __init__(self, encoder: SampleEncoder, limits: Limits, earlier: Earlier | None = None) -> None:
        self._encoder = encoder
        self._limits = limits
        self._earlier = earlier if earlier is not None else Earlier()

    def __call__(self, batch: Batch) -> Done:
        done = Done()
        samples = list(self._samples(batch, done))
        known = [self._earlier.find(address, self._limits.longest) for *_, address in samples]
        new = [sample for (_, _, sample, _), found in zip(samples, known, strict=True) if found is None]
        encoded = iter(self._encoder.encode([side for sample in new for side in pairs.sides(sample)]))
        for (line, form, sample, address), documents in zip(samples, known, strict=True):
            try:
                made = documents or pairs.joined(sample, [next(encoded) for _ in pairs.sides(sample)])
                if fitted := self._fit(line, made, form, done):
                    whole = len(fitted) == len(made) and all(one is other for one, other in zip(fitted, made, strict=True))
                    done.good.append(Good(line, fitted, _digest(fitted), address if whole else NOWHERE))
            except SampleError as error:
                done.bad.append((line, error.called(_inverse(batch.fields), first=True)))
        return done

    def _samples(self, batch: Batch, done: Done) -> Iterator[tuple[int, formats.Format, pairs.Sample, Address]]:
        addresses = Addresses(batch.format, batch.fields)
        for line, content in batch.records:
            try:
                value = formats.renamed(parse(content), batch.fields)
                form = batch.format or formats.detect(value)
                fit.check_format(form, self._limits.objective)
                done.ignored.update(formats.ignored(value, form))
                yield line, form, pairs.read(value, form), addresses.of(content)
            except SampleError as error:
                done.bad.append((line, error.called(_inverse(batch.fields), first=True)))

    def _fit(self, line: int, documents: list[Encoded], form: formats.Format, done: Done) -> list[Encoded]:
        """Those that are short enough, and what is left of those that are not. Raises SampleError."""
        length = fit.Length(self._limits.longest, self._limits.most)
        done.longest = max(done.longest, *(min(len(document), length.longest) for document in documents))
        way = fit.fit_pair if form in PAIRS else fit.fit
        fitted = way(documents, length, self._limits.on_too_long, form)
        if fitted.fate is not None:
            done.fates.append((line, fitted.fate))
        return fitted.documents


def _inverse(fields: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in fields.items()}


def _digest(documents: list[Encoded]) -> int:
    """64 bits of ids and mask: two of a hundred million different samples share them with a chance of 3 in 10,000."""
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        digest.update(document.ids.tobytes() + (document.weights != 0).tobytes() + b"|")
    return int.from_bytes(digest.digest(), "little")
