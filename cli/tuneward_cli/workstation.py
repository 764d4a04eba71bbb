"""`tuneward train`: the prepare, train and finish processes of a cluster, on one machine without Kubernetes.

Request, plan and reports are the same files; the store's claim is a folder. What a cluster's operator decides from
status is decided here from the run directory, so that the same command again goes on where the last one ended.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.conditions import Phase, Reason
from tuneward_api.failures import classify
from tuneward_api.files import (
    FinishReport,
    Images,
    JobRef,
    Parent,
    Plan,
    PrepareReport,
    Report,
    Request,
    Result,
    canonical_json,
)
from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.manifest import write_synced
from tuneward_api.names import ExitCode
from tuneward_api.uris import Uri, parse_uri
from tuneward_api.workers import Workers
from tuneward_cli.documents import Loaded
from tuneward_cli.errors import CommandError
from tuneward_cli.finished import finished
from tuneward_cli.process import end, environment
from tuneward_cli.tries import HelperError
from tuneward_cli.voice import Voice
from tuneward_cli.words import phase_line

R = TypeVar("R", bound=Report)
_SHOWN: Final = 3
"""Fields that are named where a job is another one than before."""


@dataclass(frozen=True)
class Place:
    """Folders of one job below the store. `command`: what the person typed, for what errors say to paste."""

    store: Path
    run: Path
    claims: Mapping[str, Path] = field(default_factory=dict)
    command: str = "train"

    @property
    def request(self) -> Path:
        return self.run / "request.json"

    @property
    def plan(self) -> Path:
        return self.run / "plan.json"

    @property
    def config_maps(self) -> Path:
        return self.run / "configmaps"

    @property
    def claims_dir(self) -> Path:
        return self.run / "claims"

    def variables(self) -> dict[str, str]:
        """What stands for the mounts of a pod."""
        return {
            names.ENV_STORE_DIR: str(self.store),
            names.ENV_CLAIMS_DIR: str(self.claims_dir),
            names.ENV_CONFIGMAPS_DIR: str(self.config_maps),
            names.ENV_RUN_DIR: str(self.run),
            names.ENV_ADAPTERS_DIR: str(self.store / "adapters"),
        }


def place_of(job: FineTuneJob, store: Path, claims: Mapping[str, Path]) -> Place:
    store = store.absolute()
    return Place(store=store, run=store / names.run_directory(str(job.metadata["name"]), ""), claims=claims)


def with_workers(job: FineTuneJob, workers: int | None) -> FineTuneJob:
    """The job as `--workers` asks for it; the launcher takes no more ranks than the machine has."""
    if workers is None:
        return job
    asked = (job.spec.workers or Workers()).model_copy(update={"replicas": workers})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"workers": asked})})


def request_of(job: FineTuneJob, parent: Parent | None = None) -> Request:
    name = str(job.metadata["name"])
    return Request(
        job=JobRef(namespace=str(job.metadata.get("namespace", "default")), name=name, uid=""),
        spec=job.spec,
        images=Images(trainer="this machine"),
        store_claim=(job.spec.store.claim_name if job.spec.store else None) or names.DEFAULT_STORE_CLAIM,
        run_directory=names.run_directory(name, ""),
        parent=parent,
    )


def parent_of(place: Place, job: FineTuneJob) -> Parent | None:
    """The model of this store that the job goes on from; that of an earlier run of the same job stays what it was."""
    uri = parse_uri(job.spec.model.uri)
    if uri.scheme != "model":
        return None
    with suppress(OSError, ValidationError):
        before = Request.model_validate_json(place.request.read_bytes())
        if before.spec.model == job.spec.model and before.parent is not None:
            return before.parent
    known = {found.name: found for found in finished(place.store)}
    if uri.authority not in known:
        names_of = ", ".join(sorted(known)) or "none"
        raise CommandError(
            f"InputMissing: spec.model.uri names the model {uri.authority}, and {place.store} holds: {names_of}",
            paste=f"tuneward train FILE --store {place.store}",
            code=ExitCode.INPUT_MISSING,
        )
    return known[uri.authority].as_parent(request_of(job).store_claim)


def skipped(loaded: Loaded, job: FineTuneJob) -> list[str]:
    """The documents that a workstation has no use for, as KIND/NAME."""
    used = {uri.authority for uri in _config_map_uris(job)}
    found = []
    for value in loaded.values():
        kind, name = str(value.get("kind")), str((value.get("metadata") or {}).get("name"))
        if (kind == "ConfigMap" and name in used) or (kind == "FineTuneJob" and name == job.metadata["name"]):
            continue
        found.append(f"{kind}/{name}")
    return found


def lay_out(place: Place, loaded: Loaded, job: FineTuneJob, *, restart: bool) -> Request:
    """Makes the run directory. Refuses one that belongs to another spec or to other data of the same file. With `restart`
    what an earlier run left goes, once nothing else is missing."""
    request, files = request_of(job, parent_of(place, job)), _config_map_files(place, loaded, job)
    claims = _claims(place, request)
    if restart:
        shutil.rmtree(place.run, ignore_errors=True)
    request = _finished_request(place, request)
    wanted = {place.request: canonical_json(request.to_json()), **files}
    _take_other_workers(place, request)
    for file, text in wanted.items():
        if file.exists() and file.read_text() != text:
            raise CommandError(
                f"{place.run} belongs to another version of this job ({_difference(file, text)}); "
                "give the job another name or begin anew",
                paste=f"{_again(place, loaded, request, str(place.store))} --restart",
                code=ExitCode.CONFIG_BAD,
            )
    try:
        for file, text in wanted.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_synced(file, text.encode())
        _link(place, claims)
    except OSError as error:
        raise CommandError(
            f"StoreNotWritable: {error.filename or place.store} cannot be written ({error.strerror})",
            paste=_again(place, loaded, request, "ANOTHER_DIR"),
            code=ExitCode.CONFIG_BAD,
        ) from error
    return request


def _again(place: Place, loaded: Loaded, request: Request, store: str) -> str:
    """The command that the person typed, with this store."""
    # validate looks at all jobs of the file.
    name = "" if place.command == "validate" else f" --name {request.job.name}"
    return f"tuneward {place.command} {loaded.file}{name} --store {store}{claim_flags(place.claims)}"


def _finished_request(place: Place, request: Request) -> Request:
    """The request of a run that succeeded, if only the number of workers differs: there is nothing left for them to do."""
    try:
        plan = Plan.model_validate_json(place.plan.read_bytes())
    except (OSError, ValidationError):
        return request
    same = _without_workers(plan.request) == _without_workers(request)
    return plan.request if same and _succeeded(place, plan) else request


def _succeeded(place: Place, plan: Plan) -> bool:
    for file in place.run.glob("attempts/*/result.json"):
        try:
            result = Result.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue
        if result.outcome == "Succeeded" and result.plan_digest == plan.digest():
            return True
    return False


def _take_other_workers(place: Place, request: Request) -> None:
    """The number of workers alone may change between two runs: the result does not depend on it."""
    for file, kind in ((place.request, Request), (place.plan, Plan)):
        try:
            found = kind.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue
        before = found if isinstance(found, Request) else found.request
        if _without_workers(before) != _without_workers(request) or before == request:
            continue
        new = request if isinstance(found, Request) else found.model_copy(update={"request": request})
        write_synced(file, canonical_json(new.to_json()).encode())


def _without_workers(request: Request) -> Request:
    return request.model_copy(update={"spec": request.spec.model_copy(update={"workers": None})})


def _config_map_uris(job: FineTuneJob) -> list[Uri]:
    sets = job.spec.datasets
    uris = [parse_uri(item.uri) for item in (*sets.training, *(sets.validation or ()))]
    return [uri for uri in uris if uri.scheme == "configmap"]


def _config_map_files(place: Place, loaded: Loaded, job: FineTuneJob) -> dict[Path, str]:
    known, files = loaded.config_maps(), {}
    for uri in _config_map_uris(job):
        try:
            text = known[uri.authority][uri.path]
        except KeyError as error:
            raise CommandError(
                f"InputMissing: {uri} names no ConfigMap of {loaded.file}; put it into the same file",
                paste=f"tuneward validate {loaded.file}",
                code=ExitCode.INPUT_MISSING,
            ) from error
        files[place.config_maps / uri.authority / uri.path] = text
    return files


def _claims(place: Place, request: Request) -> dict[str, Path]:
    """The folders of all claims but the store's. Raises CommandError for one that has none, or none that exists."""
    needed = {uri.authority for uri in map(parse_uri, request.uris()) if uri.scheme == "pvc"} - {request.store_claim}
    for claim in sorted(needed - place.claims.keys()):
        raise CommandError(
            f"InputMissing: the claim {claim} is no folder of this machine yet; say which one stands for it",
            paste=f"tuneward {place.command} FILE --claim {claim}=DIR",
            code=ExitCode.INPUT_MISSING,
        )
    found = {claim: place.claims[claim].absolute() for claim in sorted(needed)}
    for claim, folder in found.items():
        if not folder.is_dir():
            raise CommandError(
                f"InputMissing: {folder}, which stands for the claim {claim}, is no folder",
                paste=f"ls {folder.parent}",
                code=ExitCode.INPUT_MISSING,
            )
    return found


def _link(place: Place, claims: Mapping[str, Path]) -> None:
    """Every claim is a link below one folder, as prepare's pod has them mounted."""
    place.claims_dir.mkdir(parents=True, exist_ok=True)
    for claim, folder in claims.items():
        link = place.claims_dir / claim
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)


def claim_flags(claims: Mapping[str, Path]) -> str:
    """For a command to paste, with a space before each."""
    return "".join(f" --claim {name}={folder}" for name, folder in claims.items())


def _difference(file: Path, text: str) -> str:
    """Which fields of a job are others than before, a few of them; of any other file its name."""
    if file.suffix != ".json":
        return f"{file.name} differs"
    before, after = (dict(_leaves(json.loads(one))) for one in (file.read_text(), text))
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    shown = [f"{path} was {before.get(path, 'not set')}, now {after.get(path, 'not set')}" for path in changed[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, JSON) of what holds nothing else."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def prepare(place: Place, request: Request, voice: Voice) -> Plan:
    """Checks everything and chooses every default; the plan of an earlier run stays as it is."""
    if place.plan.exists():
        return Plan.model_validate_json(place.plan.read_bytes())
    with voice.waiting(phase_line(request.job.name, Phase.VALIDATING)) as wait:
        report = _report(place, PrepareReport, "prepare", ["--request", str(place.request)])
        if report.prepared is None:
            raise CommandError("prepare reported no result", paste=f"tail -50 {place.run / 'workers' / 'prepare.log'}")
        found = report.prepared
        data = found.data.summary
        wait.end_with(f"{data.samples} samples, {data.tokens:,} tokens, {found.hyperparameters.steps} steps")
    plan = Plan(request=request, prepared=found)
    write_synced(place.plan, canonical_json(plan.to_json()).encode())
    return plan


def finish(place: Place, plan: Plan, voice: Voice) -> FinishReport:
    """Checks the result, holds the gate, files the adapter."""
    with voice.waiting(phase_line(plan.request.job.name, Phase.REGISTERING)):
        return _report(place, FinishReport, "finish", ["--plan", str(place.plan)])


def mounts(place: Place, plan: Plan) -> dict[str, str]:
    """Where an attempt finds model and data."""
    base = plan.prepared.base
    root = place.store if base.claim == plan.request.store_claim else place.claims_dir / base.claim
    return {
        **place.variables(),
        names.ENV_MODEL_DIR: str(root / base.sub_path),
        names.ENV_DATA_DIR: str(place.store / plan.prepared.data.sub_path),
    }


def _report(place: Place, kind: type[R], command: str, arguments: list[str]) -> R:
    """Runs prepare or finish to its end and reads what it said last. Raises HelperError with its sentence, or CommandError
    where another try is in vain."""
    folder = place.run / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    last_words, log = folder / f"{command}.termination", folder / f"{command}.log"
    last_words.unlink(missing_ok=True)
    variables = {**place.variables(), names.ENV_TERMINATION_LOG: str(last_words)}
    if command == "finish":
        variables = {**mounts(place, Plan.model_validate_json(place.plan.read_bytes())), **variables}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneward_trainer", command, *arguments],
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        code = process.wait()
    except BaseException:
        end(process.pid)
        raise
    try:
        report = kind.model_validate_json(last_words.read_bytes())
    except (OSError, ValidationError) as error:
        sentence = f"{command} ended with exit code {code} and no report"
        failure = replace(classify(exit_code=code), sentence=sentence)
        raise HelperError(sentence, paste=f"tail -50 {log}", code=code or 1, failure=failure) from error
    if report.outcome == "Failed":
        said, paste = f"{report.reason}: {report.message}", _remedy(place, report, log)
        if report.reason == Reason.GATE_REFUSED:
            raise CommandError(said, paste=paste, code=code or 1)
        failure = classify(exit_code=code, reason=str(report.reason), message=report.message)
        raise HelperError(said, paste=paste, code=code or 1, failure=failure)
    return report


def _remedy(place: Place, report: Report, log: Path) -> str:
    """The one command that helps with a refusal of prepare or finish."""
    if str(report.reason) == "InputMissing" and "imports/" in report.message:
        return f"tuneward import MODEL_DIR NAME --store {place.store}"
    answers = sorted(place.run.glob("attempts/*/generations.jsonl"))
    if report.reason == Reason.GATE_REFUSED and answers:
        return f"less {answers[-1]}"
    return f"tail -50 {log}"
