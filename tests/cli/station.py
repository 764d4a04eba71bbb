"""A workstation with a model so small that its processes take longer to start than to train."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.support.process import killed_after


def chats(count: int) -> str:
    """Lines of a .jsonl file."""
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"It is {i * 7}."}]}
        for i in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


TRAINING = {"training": [{"uri": "configmap://chats/train.jsonl"}]}


@dataclass(frozen=True)
class Station:
    """A folder with a job and a store that holds its model."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def model(self) -> Path:
        return self.store / "imports/tiny"

    @property
    def run(self) -> Path:
        return self.store / "jobs/small"

    def write(self, **spec: Any) -> Path:
        job = {
            "apiVersion": "tuneward.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "small"},
            "spec": {
                "model": {"uri": "pvc://tuneward-store/imports/tiny"},
                "datasets": TRAINING,
                "workers": {"gpusPerWorker": 0},
                **spec,
            },
        }
        data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "chats"}, "data": {"train.jsonl": chats(40)}}
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump_all([data, job]))
        return file

    def tuneward(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tuneward_cli", *arguments],
            capture_output=True, text=True, timeout=500, check=False, cwd=self.folder,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, still running."""
        return subprocess.Popen(
            [sys.executable, "-m", "tuneward_cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
        )  # fmt: skip

    def on_a_terminal(self, *arguments: str) -> tuple[int, str]:
        """Exit code and what a terminal of 160 columns shows."""
        ours, its = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneward_cli", *arguments],
            stdin=its, stdout=its, stderr=its, cwd=self.folder, env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
        )  # fmt: skip
        os.close(its)
        shown = b""
        # Reading from a terminal whose other end is closed is an error on Linux.
        with contextlib.suppress(OSError), killed_after(500, process):
            while piece := os.read(ours, 65536):
                shown += piece
        os.close(ours)
        return process.wait(timeout=60), shown.decode(errors="replace")

    def train(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.tuneward("train", "job.yaml", "--store", str(self.store), *arguments)
