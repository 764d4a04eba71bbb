"""`tuneward` as a user runs it, and what a run of the demo left."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cluster import ROOT, Cluster

MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"


@dataclass(frozen=True)
class Command:
    """`tuneward` as a user runs it, in a home of its own, `within` another command where one is given."""

    home: Path
    within: tuple[str, ...] = ()

    def run(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.within, sys.executable, "-m", "tuneward_cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=ROOT,
            env=self.environment(),
        )

    def environment(self) -> dict[str, str]:
        known = {key: value for key, value in os.environ.items() if key != "KUBECONFIG"}
        return {**known, "TUNEWARD_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}

    def ok(self, *arguments: str, timeout: float = 600) -> str:
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, f"tuneward {' '.join(arguments)}: {done.returncode}\n{done.stderr}\n{done.stdout}"
        return done.stdout


@dataclass(frozen=True)
class Demo:
    """What a run of the demo said, and the cluster that it left."""

    command: Command
    cluster: Cluster
    report: dict[str, Any]
    said: str


def processes_of(home: Path) -> list[str]:
    """Command lines of this machine that name the data directory."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in line and "pytest" not in line:
            found.append(line)
    return found
