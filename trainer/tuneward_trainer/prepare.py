"""`prepare`: everything that can go wrong without a GPU goes wrong here, with a sentence.

Finds the base model, checks the job against it, tokenizes the data into a cache named by its content, and chooses
every default. Run again it finds all of that done, and reports the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from tuneward_api import manifest
from tuneward_api.conditions import Reason
from tuneward_api.datasets import Dataset, Datasets
from tuneward_api.estimate import GIB
from tuneward_api.estimate import Data as Statistics
from tuneward_api.files import Base, Data, Prepared, PrepareReport, Request, termination_message
from tuneward_api.finetunejob import FineTuneJobSpec, Hyperparameters, Method
from tuneward_api.names import MAX_MESSAGE, TERMINATION_MESSAGE_LIMIT, ExitCode
from tuneward_api.resolved import ResolvedData, ResolvedHyperparameters, ResolvedMethod, ResolvedPacking
from tuneward_api.uris import parse_uri
from tuneward_trainer import defaults, grade, memory, models
from tuneward_trainer.data.build import ERRORS, DataError, build
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents
from tuneward_trainer.data.earlier import Earlier
from tuneward_trainer.data.gathered import Summary
from tuneward_trainer.data.journal import JOURNAL
from tuneward_trainer.data.samples import Limits, Source
from tuneward_trainer.facts import Facts, examine, stop_ids
from tuneward_trainer.report import EndError, config_bad, emit, ending, input_missing, model_unsupported, start_logging
from tuneward_trainer.schedule import documents_a_unit
from tuneward_trainer.store import Places, alone, make_directory
from tuneward_trainer.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

FOLDER: Final = "prepare"
_CACHE_VERSION: Final = 5
"""Raised when the same bytes would give other tokens or masks, or the cache holds other files."""
_ENCODING: Final = "encoding"
"""File of a cache: the key of what its samples were made with."""
_LOOKED_INTO: Final = 4
"""Earlier caches: a data set grows from one to the next."""


def main(request_file: Path) -> int:
    """Returns the exit code."""
    start_logging()
    places = Places.from_environment()
    folder: Path | None = None

    def work() -> PrepareReport:
        nonlocal folder
        request = read_request(request_file)
        folder = make_run_directory(places.root() / request.run_directory)
        prepared = prepare(request, places, folder)
        return fitting(PrepareReport(outcome="Done", reason=Reason.VALIDATED, message=sentence(prepared), prepared=prepared))

    report, error = ending(work)
    if error is not None:
        return emit(PrepareReport(outcome="Failed", reason=error.reason, message=error.message), folder, code=error.code)
    assert report is not None
    return emit(report, folder, code=ExitCode.OK)


def fitting(report: PrepareReport) -> PrepareReport:
    """The kubelet cuts a longer message, and a cut report is none: the job would be prepared for ever."""
    if len(termination_message(report).encode()) > TERMINATION_MESSAGE_LIMIT:
        raise config_bad(
            "spec.method.targetModules holds too many long names; name layers by their last part, such as q_proj"
        )
    return report


def read_request(file: Path) -> Request:
    """Raises EndError."""
    try:
        return Request.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise input_missing(f"the request {file} does not exist") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise config_bad(f"the request is not valid: {place}: {first['msg']}") from error


def make_run_directory(folder: Path) -> Path:
    """What prepare and the attempts write to; attempt pods mount it and make nothing above it."""
    for name in ("attempts", "checkpoints", FOLDER):
        make_directory(folder / name)
    return folder / FOLDER


def prepare(request: Request, places: Places, folder: Path) -> Prepared:
    """`folder`: the run directory's own for prepare. Raises EndError."""
    spec = request.spec
    hyper = spec.hyperparameters or Hyperparameters()
    found = models.find(request.base_uri, places=places, store_claim=request.store_claim, pins=folder / "pins.json")
    facts = examine(found.folder)
    check_task(request)
    limits = defaults.limits(spec, facts)
    objective = defaults.objective(spec)
    method = method_of(request, found, facts, places, folder.parent)
    packing = verify(found, method, compiling=compiles(request, method), longest=limits.longest)
    tokenizer = load_tokenizer(found.folder)
    cache = tokenize(request, places, folder, Inputs(found.folder, tokenizer, limits))
    summary = Summary.read(cache.folder)
    for note in summary.notes():
        log.info("%s", note)
    lengths = Documents.open(cache.folder / TRAINING).lengths
    numbers = defaults.hyperparameters(
        hyper, lengths=lengths, summary=summary, facts=facts, longest=limits.longest, objective=objective, method=method.type
    )
    data = memory.statistics(lengths, summary.target_tokens)
    costs = costs_of(spec, found.folder, method, numbers, facts, data, documents_a_unit(objective.type))
    room = memory.worker_memory(spec) if memory.device_of(spec) == "cpu" else None
    weights = memory.base_weights(spec, costs, room)
    if costs and weights == "Sharded":
        whole, costs = costs, costs.sharded
        least = memory.Choice(1)
        log.info(
            "the base model is sharded over %d ranks: each needs about %.1f GiB, and would need %.1f with all of it",
            costs.ranks,
            costs.memory(least).resident / GIB,
            whole.memory(least).resident / GIB,
        )
    choice = costs.choose(room) if costs else memory.Choice(1)
    if method.target_modules is not None:
        say_share(facts, method.target_modules)
    if costs and room and (needed := costs.memory(choice).resident) > room:
        log.warning("about %.1f GiB are needed, and the job gives a worker %.1f", needed / GIB, room / GIB)
    return Prepared(
        base=base_of(found, facts, tokenizer),
        data=Data(sub_path=cache.sub_path, summary=_resolved(cache.digest, summary)),
        objective=objective,
        method=method,
        hyperparameters=numbers,
        packing=packing,
        bins_per_micro_batch=choice.bins,
        base_weights=weights,
        estimate=memory.estimate(costs, choice, summary.tokens) if costs else None,
        model_type=facts.model_type,
    )


def say_share(facts: Facts, targets: list[str]) -> None:
    """Of a mixture of experts: how much of it learns."""
    from tuneward_trainer.model import adapted_share

    share = adapted_share(facts.empty, targets)
    if share is not None:
        log.info("adapters are on %.1f%% of the weights that a token passes through; routed experts have none", 100 * share)


def costs_of(
    spec: FineTuneJobSpec,
    folder: Path,
    method: ResolvedMethod,
    hyper: ResolvedHyperparameters,
    facts: Facts,
    data: Statistics,
    unit: int = 1,
) -> memory.Costs | None:
    """None for a model whose config.json does not say what memory and time depend on."""
    shape = memory.shape_of(folder)
    if shape is None:
        return None
    device = memory.device_of(spec)
    return memory.Costs.of(
        shape,
        method,
        hyper,
        parameters=facts.parameters,
        data=data,
        device=device,
        unit=unit,
        ranks=memory.ranks_of(spec),
    )


def check_task(request: Request) -> None:
    """Raises EndError where the schema of answers is none."""
    evaluation = request.spec.evaluation
    task = evaluation.task if evaluation is not None else None
    if task is not None and task.json_schema is not None:
        try:
            grade.schema_of(task.json_schema)
        except ValueError as error:
            raise config_bad(f"spec.evaluation.task.jsonSchema is no JSON Schema: {error}") from error


def method_of(request: Request, base: models.Found, facts: Facts, places: Places, run: Path) -> ResolvedMethod:
    """The job's; where it goes on from an adapter, which is then below `run`, that one's, unless all weights are trained."""
    asked, claim = request.spec.method or Method(), request.store_claim
    if request.parent is None:
        return defaults.method(asked, facts)
    from tuneward_trainer import parent

    if request.parent.whole:
        parent.filed(request.parent, places=places, store_claim=claim)
        return defaults.method(asked, facts)
    folder = parent.take(request.parent, base, places=places, store_claim=claim, run=run)
    return (
        defaults.method(asked, facts) if asked.type == "Full" else parent.method(asked, folder, facts, request.parent.name)
    )


def base_of(found: models.Found, facts: Facts, tokenizer: Tokenizer) -> Base:
    return Base(
        uri=found.uri,
        key=found.key,
        digest=found.digest,
        architecture=facts.architecture,
        parameters=facts.parameters,
        claim=found.claim,
        sub_path=found.sub_path,
        chat_template_digest=tokenizer.chat_digest,
    )


def _resolved(digest: str, summary: Summary) -> ResolvedData:
    return ResolvedData(
        digest=digest,
        samples=summary.samples,
        tokens=summary.tokens,
        target_tokens=summary.target_tokens,
        validation_samples=summary.validation_samples,
        split=summary.split or None,
        truncated=summary.truncated or None,
        skipped=summary.skipped or None,
        invalid=summary.invalid or None,
    )


def compiles(request: Request, method: ResolvedMethod) -> bool:
    """Whether the job's ranks are to compile their layers. A workstation (no uid) has no other machine: without a GPU they
    run on its processors, whatever the job asks for."""
    import torch

    from tuneward_trainer import compiled

    here = not request.job.uid and not torch.cuda.is_available()
    return compiled.fits(method) and compiled.asked("cpu" if here else memory.device_of(request.spec))


def verify(found: models.Found, method: ResolvedMethod, *, compiling: bool, longest: int) -> ResolvedPacking:
    """Which patches agree with the plain model; the verdict is kept beside the model. `longest`: tokens of a document."""
    from tuneward_trainer import verify as verifier
    from tuneward_trainer.model import ModelUnsupportedError

    try:
        folder, how = make_directory(found.cache / "verify"), method.type
        whole, packed = how == "Full", how == "QLoRA"
        return verifier.verify(found.folder, folder, whole=whole, packed=packed, compiling=compiling, longest=longest)
    except ModelUnsupportedError as error:
        raise model_unsupported(f"the base model cannot be trained: {error}") from error


@dataclass(frozen=True)
class Inputs:
    """What tokens depend on beside the data and the job."""

    model: Path
    tokenizer: Tokenizer
    limits: Limits


@dataclass(frozen=True)
class Cache:
    folder: Path
    sub_path: str
    digest: str


def tokenize(request: Request, places: Places, folder: Path, inputs: Inputs) -> Cache:
    """The cache that the data's content names: found complete, or made. Raises EndError."""
    datasets = request.spec.datasets
    training = sources(datasets.training, "training", places, request.store_claim)
    validation = sources(datasets.validation or [], "validation", places, request.store_claim)
    key = cache_key(training, validation, datasets, inputs)
    sub_path = f"data/sha256-{key}"
    target = places.store / sub_path
    with alone(target):
        if not manifest.complete(target):
            if not (target / JOURNAL).exists():
                shutil.rmtree(target, ignore_errors=True)
            for part in (TRAINING, VALIDATION):
                make_directory(target / part)
            _fill(target, folder, training, validation, datasets, inputs)
    (folder / ERRORS).unlink(missing_ok=True)
    if (target / ERRORS).exists():
        shutil.copyfile(target / ERRORS, folder / ERRORS)
    return Cache(target, sub_path, f"sha256:{key}")


def _fill(
    target: Path,
    folder: Path,
    training: Sequence[Source],
    validation: Sequence[Source],
    datasets: Datasets,
    inputs: Inputs,
) -> None:
    encoder = inputs.tokenizer.encoder(datasets.loss_on or "Assistant")
    try:
        encoding = encoding_key(datasets, inputs)
        earlier = earlier_caches(target.parent, encoding)
        build(target, training=training, validation=validation, encoder=encoder, limits=inputs.limits, earlier=earlier)
        (target / _ENCODING).write_text(encoding + "\n")
    except DataError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise data_bad(error, folder / ERRORS) from error
    manifest.write_manifest(target)


def data_bad(error: DataError, file: Path) -> EndError:
    """All problems go to `file`, and as many as fit into the sentence."""
    lines = error.problems.lines()
    manifest.write_synced(file, ("\n".join(lines) + "\n").encode())
    for line in lines[:20]:
        log.error("%s", line)
    # jobs/<name>-<uid8>/prepare/errors.txt
    where = f"; all of them: {'/'.join(file.parts[-4:])} in the store" if len(lines) > 1 else ""
    return EndError(ExitCode.DATA_BAD, Reason.DATA_INVALID, error.problems.summary(MAX_MESSAGE - len(where)) + where)


def sources(datasets: Sequence[Dataset], part: str, places: Places, store_claim: str) -> list[Source]:
    """Raises EndError for the first that does not exist."""
    found = []
    for index, dataset in enumerate(datasets):
        uri = parse_uri(dataset.uri)
        root = places.configmaps / uri.authority if uri.scheme == "configmap" else places.claim(uri.authority, store_claim)
        path = root / uri.path
        if not path.exists():
            raise input_missing(f"spec.datasets.{part}[{index}].uri {dataset.uri} does not exist{_hint(root, uri.scheme)}")
        copies = (dataset.weight or 1) if part == "training" else 1
        found.append(Source(dataset.uri, path, dataset.format, copies, dict(dataset.fields or {})))
    return found


def _hint(root: Path, scheme: str) -> str:
    if scheme != "configmap":
        return ""
    keys = sorted(file.name for file in root.iterdir() if not file.name.startswith(".")) if root.is_dir() else []
    return f"; the ConfigMap has the keys {', '.join(keys)}" if keys else "; there is no such ConfigMap, or it is empty"


def cache_key(training: Sequence[Source], validation: Sequence[Source], datasets: Datasets, inputs: Inputs) -> str:
    """sha256 over everything that the cache depends on."""
    parts = {
        "encoding": encoding_key(datasets, inputs),
        # What the model was made for shapes a sentence alone.
        "limits": {name: value for name, value in asdict(inputs.limits).items() if name != "most"},
        "training": [_identity(source) for source in training],
        "validation": [_identity(source) for source in validation],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encoding_key(datasets: Datasets, inputs: Inputs) -> str:
    """sha256 over everything that tokens and mask of a sample depend on, but the sample and how long it may be."""
    files = {
        name: manifest.hash_file(inputs.model / name) for name in inputs.tokenizer.files if (inputs.model / name).is_file()
    }
    parts = [_CACHE_VERSION, files, stop_ids(inputs.model), datasets.loss_on or "Assistant"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def earlier_caches(data: Path, encoding: str) -> Earlier:
    """The newest complete ones with that encoding in the store's folder of caches."""
    same = []
    for file in data.glob(f"sha256-*/{_ENCODING}"):
        with contextlib.suppress(OSError):  # somebody may tidy up
            if manifest.complete(file.parent) and file.read_text().strip() == encoding:
                same.append((file.stat().st_mtime, file.parent))
    newest = sorted(same, reverse=True)[:_LOOKED_INTO]
    return Earlier([folder / part for _, folder in newest for part in (TRAINING, VALIDATION)])


def _identity(source: Source) -> list[Any]:
    files = [(uri, manifest.hash_file(path)) for uri, path in source.files()]
    return [source.uri, source.format, source.copies, source.fields, files]


def sentence(prepared: Prepared) -> str:
    """What was found, in one line."""
    data, numbers, method = prepared.data.summary, prepared.hyperparameters, prepared.method
    fates = {
        "too long and split": data.split,
        "too long and cut at their end": data.truncated,
        "too long and left out": data.skipped,
        "invalid and left out": data.invalid,
    }
    noun = "pairs" if prepared.objective.type == "DPO" else "samples"
    left = "".join(f"{count} {fate}; " for fate, count in fates.items() if count)
    adapter = f"{method.type} of rank {method.rank}" if method.type != "Full" else "full fine-tuning"
    return (
        f"{data.samples} {noun}, {data.tokens} tokens ({data.target_tokens} learnt); {left}"
        f"{numbers.steps} steps of about {numbers.batch_tokens} tokens; "
        f"{adapter} trains {method.trainable_parameters} of {prepared.base.parameters} parameters"
        + (", sharded over the ranks" if prepared.base_weights == "Sharded" else "")
    )
