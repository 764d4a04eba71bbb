"""`tuneward validate`: every error at once, in the words of the door that would refuse later."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tuneward_api.names import ExitCode
from tuneward_cli import documents
from tuneward_cli.errors import CommandError
from tuneward_cli.process import environment
from tuneward_cli.voice import Voice

_YAML = (".yaml", ".yml", ".json")


def validate(files: Sequence[Path], model: Path | None, voice: Voice) -> int:
    """YAML against the contract, data against a model's chat template. The worst exit code of both."""
    manifests = [file for file in files if file.suffix in _YAML]
    data = [file for file in files if file.suffix not in _YAML]
    if data and model is None:
        raise CommandError(
            f"{data[0]} is data: its chat template comes from a model",
            paste=f"tuneward validate {data[0]} --model DIR",
            code=2,
        )
    return max(_manifests(manifests, voice), _data(data, model, voice) if model and data else 0)


def _manifests(files: Sequence[Path], voice: Voice) -> int:
    report = []
    for file in files:
        loaded = documents.load(file)
        for problem in loaded.problems:
            voice.line(str(problem))
        if not loaded.problems:
            voice.done(f"{file}: {_counted(loaded)}")
        report += [vars(problem) for problem in loaded.problems]
    if files:
        voice.result({"valid": not report, "problems": report})
    return ExitCode.CONFIG_BAD if report else ExitCode.OK


def _counted(loaded: documents.Loaded) -> str:
    ours = ", ".join(f"{value['kind']}/{value['metadata'].get('name')}" for value in loaded.values() if "metadata" in value)
    return f"valid ({ours})"


def _data(files: Sequence[Path], model: Path, voice: Voice) -> int:
    """The trainer reads data; this process must not load torch. Its words and exit code are passed on."""
    for file in files:
        if not file.exists():
            raise CommandError(f"{file} is not there", paste=f"ls {file.parent}", code=ExitCode.INPUT_MISSING)
    command = [sys.executable, "-m", "tuneward_trainer", "validate", "--model", str(model), *map(str, files)]
    stdout = sys.stderr if voice.json else None
    return subprocess.run(command, env=environment(), check=False, stdout=stdout).returncode
