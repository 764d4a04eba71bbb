"""`tuneward merge ADAPTER DIR --model BASE`: a model of its own, for what loads no adapter, or not one of its kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tuneward_api.names import ExitCode
from tuneward_cli.errors import CommandError
from tuneward_cli.process import environment
from tuneward_cli.voice import Voice


def merge(adapter: Path, base: Path, folder: Path, voice: Voice) -> int:
    """Raises CommandError."""
    command = [sys.executable, "-m", "tuneward_trainer", "merge", str(adapter), str(folder), "--model", str(base)]
    with voice.waiting("adding the adapter to its base model's weights"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it ended without a word"]
        if done.returncode:
            raise CommandError(said[-1], paste="tuneward merge --help", code=done.returncode)
    voice.done(said[-1])
    voice.line(f"next: vllm serve {folder}, or tuneward import {folder} NAME")
    voice.result({"folder": str(folder)})
    return ExitCode.OK
