"""`tuneward validate`: every error at once, in the words of the door that would refuse later."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.names import ExitCode
from tuneward_cli import documents, workstation
from tuneward_cli.documents import Loaded
from tuneward_cli.errors import USAGE, CommandError
from tuneward_cli.process import environment
from tuneward_cli.voice import Voice

_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `tuneward validate` was asked for."""

    files: Sequence[Path]
    store: Path | None = None
    claims: Mapping[str, Path] = field(default_factory=dict)
    model: Path | None = None
    validation: Sequence[Path] = ()
    sequence_length: int | None = None
    show: int | None = None
    corrected: Path | None = None

    @property
    def manifests(self) -> list[Path]:
        """With a model .json is data, as many data sets have it."""
        known = _YAML if self.model is not None else (*_YAML, ".json")
        return [file for file in self.files if file.suffix in known]

    @property
    def data(self) -> list[Path]:
        return [file for file in self.files if file not in self.manifests]

    @property
    def looks_at_jobs(self) -> bool:
        """Whether the data of jobs is read too."""
        return self.store is not None or bool(self.claims)


@dataclass
class _Report:
    """What is said in one object with --output json, and the worst exit code."""

    code: int = ExitCode.OK
    problems: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"valid": not self.code, "problems": self.problems, "data": self.data}


def validate(wanted: Wanted, voice: Voice) -> int:
    """YAML against the contract, data against a model's chat template. The worst exit code of all."""
    _check_arguments(wanted)
    report = _Report()
    for file in wanted.manifests:
        loaded = _manifest(file, wanted, report, voice)
        for job in loaded.jobs if wanted.looks_at_jobs and not loaded.problems else ():
            _job(loaded, job, wanted, report, voice)
    if wanted.data:
        _data(wanted, report, voice)
    voice.result(report.to_json())
    return report.code


def _check_arguments(wanted: Wanted) -> None:
    """Raises CommandError for options that nothing here would look at."""
    if wanted.data and wanted.model is None:
        raise CommandError(
            f"{wanted.data[0]} is data: its chat template comes from a model",
            paste=f"tuneward validate {wanted.data[0]} --model DIR",
            code=USAGE,
        )
    of_files = {"--model": wanted.model, "--validation": wanted.validation, "--sequence-length": wanted.sequence_length}
    of_data = {"--show": wanted.show, "--write-corrected": wanted.corrected}
    idle = [name for name, value in of_files.items() if value and not wanted.data]
    idle += [name for name, value in of_data.items() if value and not wanted.data and not wanted.looks_at_jobs]
    if idle:
        needs = "data files" if idle[0] in of_files else "data files, or --store DIR to look at a job's data"
        raise CommandError(f"{idle[0]} needs {needs}", paste="tuneward validate --help", code=USAGE)
    for file in (*wanted.data, *wanted.validation):
        if not file.exists():
            raise CommandError(f"{file} is not there", paste=f"ls {file.parent}", code=ExitCode.INPUT_MISSING)


def _manifest(file: Path, wanted: Wanted, report: _Report, voice: Voice) -> Loaded:
    loaded = documents.load(file)
    for problem in loaded.problems:
        voice.line(str(problem))
    if loaded.problems:
        report.code = max(report.code, ExitCode.CONFIG_BAD)
    else:
        for note in loaded.notes:
            voice.line(f"  {note}")
        voice.done(f"{file}: {_counted(loaded)}")
        if loaded.jobs and not wanted.looks_at_jobs:
            voice.line(f"next: tuneward validate {file} --store DIR   (looks at the data too)")
    report.problems += [vars(problem) for problem in loaded.problems]
    return loaded


def _counted(loaded: Loaded) -> str:
    ours = ", ".join(f"{value['kind']}/{value['metadata'].get('name')}" for value in loaded.values() if "metadata" in value)
    return f"valid ({ours})"


def _job(loaded: Loaded, job: FineTuneJob, wanted: Wanted, report: _Report, voice: Voice) -> None:
    """The data of a job, laid out as `tuneward train` lays it out, in a folder that goes away."""
    store = (wanted.store or Path("tuneward-store")).absolute()
    if not store.is_dir():
        raise CommandError(f"{store} is not there", paste=f"tuneward import MODEL_DIR NAME --store {store}", code=66)
    with tempfile.TemporaryDirectory(prefix="tuneward-validate-") as folder:
        place = workstation.Place(
            store=store, run=Path(folder), claims={**loaded.claims, **wanted.claims}, command="validate"
        )
        workstation.lay_out(place, loaded, job, restart=False)
        what, arguments = f"FineTuneJob/{job.metadata['name']}", ["--request", str(place.request)]
        _trainer(what, arguments, place.variables(), wanted, report, voice)


def _data(wanted: Wanted, report: _Report, voice: Voice) -> None:
    arguments = ["--model", str(wanted.model), *map(str, wanted.data)]
    arguments += [word for file in wanted.validation for word in ("--validation", str(file))]
    if wanted.sequence_length is not None:
        arguments += ["--sequence-length", str(wanted.sequence_length)]
    _trainer("files", arguments, {}, wanted, report, voice)


def _trainer(
    what: str, arguments: list[str], variables: Mapping[str, str], wanted: Wanted, report: _Report, voice: Voice
) -> None:
    """The trainer reads data; this process must not load torch. Its words and exit code are passed on."""
    if wanted.show is not None:
        arguments += ["--show", str(wanted.show)]
    if wanted.corrected is not None:
        arguments += ["--write-corrected", str(wanted.corrected)]
    command = [
        sys.executable,
        "-m",
        "tuneward_trainer",
        "validate",
        *arguments,
        "--output",
        "json" if voice.json else "text",
    ]
    done = subprocess.run(
        command, env=environment(variables), check=False, stdout=subprocess.PIPE if voice.json else None, text=True
    )
    # What was killed has a negative one.
    report.code = max(report.code, done.returncode if done.returncode >= 0 else 1)
    if voice.json:
        found = _read(done.stdout)
        report.problems += found.pop("problems", [])
        report.data.append({"of": what, **found})


def _read(text: str) -> dict[str, Any]:
    """A process that died has said why on stderr."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        found = {"valid": False, "message": "the trainer ended without a report"}
    return found
