"""`validate`: what prepare would say about data, and more of it: every error, counts, lengths, samples that occur twice.

Reads as prepare reads, through the same code; nothing is loaded or kept but some numbers a sample.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuneward_api.files import Request
from tuneward_api.finetunejob import Hyperparameters, Method
from tuneward_api.names import ExitCode
from tuneward_api.objective import PAIRS, SUPERVISED, ResolvedObjective
from tuneward_api.resolved import ResolvedHyperparameters, ResolvedMethod
from tuneward_trainer import defaults, estimate, memory, models, parent
from tuneward_trainer.data import corrected, show
from tuneward_trainer.data.build import gather
from tuneward_trainer.data.corrected import Corrected
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.data.gathered import Gathered
from tuneward_trainer.data.render import LossOn
from tuneward_trainer.data.samples import Limits, Source, Worker
from tuneward_trainer.facts import Facts, examine
from tuneward_trainer.findings import Findings
from tuneward_trainer.prepare import check_task, read_request, sources
from tuneward_trainer.report import config_bad, ending, input_missing, start_logging
from tuneward_trainer.store import Places
from tuneward_trainer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Wanted:
    """What is to be checked, with which model and which numbers of the job."""

    model: Path
    facts: Facts
    training: Sequence[Source]
    validation: Sequence[Source]
    loss_on: LossOn
    limits: Limits
    hyper: Hyperparameters
    objective: ResolvedObjective
    method: ResolvedMethod
    on_gpu: bool

    def files(self) -> list[tuple[str, Path]]:
        return [file for source in (*self.training, *self.validation) for file in source.files()]


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    start_logging()
    findings, error = ending(lambda: _run(arguments))
    as_json = arguments.output == "json"
    if error is not None:
        sys.stderr.write(f"{error.message}\n")
        if as_json:
            _write_json({"valid": False, "reason": str(error.reason), "message": error.message})
        return error.code
    assert findings is not None
    if as_json:
        _write_json(findings.to_json())
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        sys.stdout.writelines(f"{line}\n" for line in findings.lines(colour=colour))
    return ExitCode.OK if findings.valid else ExitCode.DATA_BAD


def _write_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _run(arguments: argparse.Namespace) -> Findings:
    """Raises EndError."""
    if (arguments.request is None) != (arguments.model is not None and bool(arguments.files)):
        raise config_bad("give either --request FILE, or --model DIR and data files")
    wanted = _of_request(arguments.request) if arguments.request is not None else _of_files(arguments)
    targets = _targets(wanted, arguments.write_corrected)
    tokenizer = load_tokenizer(wanted.model)
    encoder = tokenizer.encoder(wanted.loss_on)
    with tempfile.TemporaryDirectory(prefix="tuneward-validate-") as name:
        folder = Path(name)
        found = gather(
            folder,
            training=wanted.training,
            validation=wanted.validation,
            encoder=encoder,
            limits=wanted.limits,
            keep_tokens=False,
        )
        # What is mapped stays readable when its folder is gone.
        training, validation = Documents.open(folder / TRAINING), Documents.open(folder / VALIDATION)
    worker = Worker(encoder, wanted.limits)
    return Findings(
        gathered=found,
        training=training,
        validation=validation,
        numbers=(numbers := _numbers(wanted, found, training)),
        time=_time(wanted, numbers, found, training),
        shown=[
            one
            for source in (*wanted.training, *wanted.validation)
            for one in show.first_samples(source, worker, tokenizer, arguments.show)
        ],
        corrected=list(_corrected(wanted, found, targets)),
    )


def _of_files(arguments: argparse.Namespace) -> Wanted:
    """Files without a job: supervised or, where they hold pairs, DPO, with every default. Raises EndError."""
    for path in (arguments.model, *arguments.files, *arguments.validation):
        if not path.exists():
            raise input_missing(f"{path} does not exist")
    facts = examine(arguments.model)
    hyper = _with_length(arguments.sequence_length)
    training = [Source(str(file), file) for file in arguments.files]
    in_pairs = any(source.detected() in PAIRS for source in training)
    objective = ResolvedObjective(type="DPO") if in_pairs else SUPERVISED
    return Wanted(
        model=arguments.model,
        facts=facts,
        training=training,
        validation=[Source(str(file), file) for file in arguments.validation],
        loss_on=arguments.loss_on,
        limits=Limits(defaults.longest_sample(hyper, facts), objective=objective.type, most=facts.max_length),
        hyper=hyper,
        objective=objective,
        method=defaults.method(Method(), facts),
        on_gpu=estimate.gpu_room(None) is not None,
    )


def _with_length(asked: int | None) -> Hyperparameters:
    """Raises EndError for a length that no job may have."""
    try:
        return Hyperparameters(sequence_length=asked)
    except ValidationError as error:
        raise config_bad(f"--sequence-length is {asked}: {error.errors()[0]['msg'].lower()}") from error


def _of_request(file: Path) -> Wanted:
    """Checks the job against its model too. Raises EndError."""
    request: Request = read_request(file)
    check_task(request)
    places, spec, claim = Places.from_environment(), request.spec, request.store_claim
    folder = models.find(request.base_uri, places=places, store_claim=claim).folder
    facts = examine(folder)
    method = spec.method or Method()
    filed = None if request.parent is None else parent.filed(request.parent, places=places, store_claim=claim)
    if filed is None or request.parent is None or request.parent.whole or method.type == "Full":
        resolved = defaults.method(method, facts)
    else:
        resolved = parent.method(method, filed, facts, request.parent.name)
    hyper = spec.hyperparameters or Hyperparameters()
    return Wanted(
        model=folder,
        facts=facts,
        training=sources(spec.datasets.training, "training", places, claim),
        validation=sources(spec.datasets.validation or [], "validation", places, claim),
        loss_on=spec.datasets.loss_on or "Assistant",
        limits=defaults.limits(spec, facts),
        hyper=hyper,
        objective=defaults.objective(spec),
        method=resolved,
        on_gpu=estimate.gpu_room(spec) is not None,
    )


def _numbers(wanted: Wanted, found: Gathered, training: Documents) -> ResolvedHyperparameters | None:
    """As prepare chooses them."""
    if not len(training):
        return None
    return defaults.hyperparameters(
        wanted.hyper,
        lengths=training.lengths,
        summary=found.summary,
        facts=wanted.facts,
        longest=wanted.limits.longest,
        objective=wanted.objective,
        method=wanted.method.type,
    )


def _time(
    wanted: Wanted, numbers: ResolvedHyperparameters | None, found: Gathered, training: Documents
) -> dict[str, Any] | None:
    """As `estimate` has it of the plan; None where nothing is known of the model's layers, or nothing is to be trained."""
    shape = memory.shape_of(wanted.model)
    if shape is None or numbers is None:
        return None
    data = memory.statistics(training.lengths, found.summary.target_tokens)
    costs = memory.Costs.of(
        shape,
        wanted.method,
        numbers,
        parameters=wanted.facts.parameters,
        data=data,
        device="cuda" if wanted.on_gpu else "cpu",
    )
    flops = costs.flops(memory.Choice(1)) * found.summary.tokens * numbers.epochs
    return estimate.time_of(flops, on_gpu=wanted.on_gpu)


def _targets(wanted: Wanted, folder: Path | None) -> dict[str, Path]:
    """Where corrected files will be, known to be free before hours are spent. Raises EndError."""
    if folder is None:
        return {}
    targets = corrected.targets(wanted.files(), folder)
    for target in targets.values():
        if target.exists():
            raise config_bad(f"{target} exists, and nothing is overwritten; give --write-corrected another folder")
    return targets


def _corrected(wanted: Wanted, found: Gathered, targets: dict[str, Path]) -> Iterator[Corrected]:
    paths = dict(wanted.files())
    for uri, target in targets.items():
        yield corrected.write_good(uri, paths[uri], target, found.problems.bad.by_file.get(uri, ()))
