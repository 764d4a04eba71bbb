"""`validate`: what prepare would say about data, without a job: counts, lengths, and every error."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.files import Request
from tuneward_api.finetunejob import Hyperparameters, Method
from tuneward_api.names import ExitCode
from tuneward_trainer import defaults, models
from tuneward_trainer.data.build import DataError, Summary, build
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.problems import Problems
from tuneward_trainer.data.render import LossOn
from tuneward_trainer.data.samples import Limits, Source
from tuneward_trainer.facts import examine, load_tokenizer, stop_ids
from tuneward_trainer.prepare import read_request, sources
from tuneward_trainer.report import config_bad, ending, input_missing, start_logging
from tuneward_trainer.store import Places

SHOWN: Final = 100
"""Problems that are printed."""
_BAR: Final = 40


@dataclass(frozen=True)
class Wanted:
    """What is to be checked, with which model."""

    model: Path
    training: Sequence[Source]
    validation: Sequence[Source]
    loss_on: LossOn
    limits: Limits


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    start_logging()
    code, error = ending(lambda: _run(arguments))
    if error is not None:
        sys.stderr.write(f"{error.message}\n")
        return error.code
    assert code is not None
    return code


def _run(arguments: argparse.Namespace) -> int:
    """Raises EndError."""
    if (arguments.request is None) != (arguments.model is not None and bool(arguments.files)):
        raise config_bad("give either --request FILE, or --model DIR and data files")
    wanted = _of_request(arguments.request) if arguments.request is not None else _of_files(arguments)
    with tempfile.TemporaryDirectory(prefix="tuneward-validate-") as folder:
        return _check(wanted, Path(folder))


def _of_files(arguments: argparse.Namespace) -> Wanted:
    """Raises EndError."""
    for path in (arguments.model, *arguments.files):
        if not path.exists():
            raise input_missing(f"{path} does not exist")
    found = [Source(str(file), file) for file in arguments.files]
    longest = defaults.longest_sample(Hyperparameters(sequence_length=arguments.sequence_length), examine(arguments.model))
    return Wanted(arguments.model, found, [], arguments.loss_on, Limits(longest))


def _of_request(file: Path) -> Wanted:
    """Checks the job against its model too. Raises EndError."""
    request: Request = read_request(file)
    places, spec, claim = Places.from_environment(), request.spec, request.store_claim
    folder = models.find(spec.model.uri, places=places, store_claim=claim).folder
    facts = examine(folder)
    defaults.method(spec.method or Method(), facts)
    longest = defaults.longest_sample(spec.hyperparameters or Hyperparameters(), facts)
    datasets = spec.datasets
    return Wanted(
        model=folder,
        training=sources(datasets.training, "training", places, claim),
        validation=sources(datasets.validation or [], "validation", places, claim),
        loss_on=datasets.loss_on or "Assistant",
        limits=defaults.limits(spec, longest),
    )


def _check(wanted: Wanted, folder: Path) -> int:
    encoder = Encoder(load_tokenizer(wanted.model), wanted.loss_on, stop_ids(wanted.model))
    try:
        summary = build(
            folder, training=wanted.training, validation=wanted.validation, encoder=encoder, limits=wanted.limits
        )
    except DataError as error:
        _write(_complaints(error.problems))
        return ExitCode.DATA_BAD
    _write(_counts(summary, Documents.open(folder / TRAINING)))
    return ExitCode.OK


def _complaints(problems: Problems) -> Iterator[str]:
    lines = [str(problem) for problem in problems.ordered()[:SHOWN]]
    yield from lines
    if problems.count > len(lines):
        yield f"… and {problems.count - len(lines)} more"
    yield f"{problems.count} {'problem' if problems.count == 1 else 'problems'}"


def _counts(summary: Summary, documents: Documents) -> Iterator[str]:
    held_out = f", {summary.validation_samples} held out" if summary.validation_samples else ""
    yield f"{summary.samples:,} samples{held_out}; {summary.tokens:,} tokens, {summary.target_tokens:,} of them learnt"
    if summary.documents != summary.samples:
        yield f"{summary.documents:,} documents: copies, and conversations whose template changes earlier turns"
    yield from summary.notes()
    yield "tokens of a document:"
    yield from histogram(documents.lengths)


def histogram(lengths: NDArray[np.int32]) -> Iterator[str]:
    """One line for each power of two that occurs."""
    bounds = 1 << np.arange(int(lengths.max()).bit_length() + 1)
    counts = np.histogram(lengths, np.concatenate([[0], bounds + 1]))[0]
    for bound, count in zip(bounds.tolist(), counts.tolist(), strict=True):
        if count:
            yield f"  up to {bound:>7,} {count:>9,} {'#' * max(1, round(_BAR * count / int(counts.max())))}"


def _write(lines: Iterator[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
