"""Other programs: run one to its end under a wait, and end one with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneward_cli.errors import CommandError
from tuneward_cli.voice import Wait


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, with this Python first on the PATH: pods of the local cluster run what the command itself runs."""
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}


def run(command: Sequence[str], wait: Wait | None = None) -> str:
    """Its output. The last line goes to `wait` as it comes. Raises CommandError with the last lines when it fails."""
    lines: list[str] = []
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(),
        # A Ctrl-C is ours alone: what we started is ended by us, in order.
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if wait is not None:
                wait.say(line.strip()[:120])
        code = process.wait()
    except BaseException:
        end(process.pid)
        raise
    if code:
        raise CommandError(f"{Path(command[0]).name} failed with exit code {code}: {''.join(lines[-20:]).strip()}")
    return "".join(lines)


def end(pid: int, *, grace: float = 20.0) -> None:
    """SIGTERM to the process group, SIGKILL after `grace` seconds."""
    for number, limit in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            return
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if _gone(pid):
                return
            time.sleep(0.05)


def _gone(pid: int) -> bool:
    """Reaps it when it is our child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
