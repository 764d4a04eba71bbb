"""The launcher's side of trackers: a process for each, started before the ranks, ended after them within seconds."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tuneward_api.files import Plan
from tuneward_api.trackers import TrackerState

END_SECONDS: Final = 8.0
"""For the last figures of all of them. The launcher has 15 s of a pod's grace period for itself (`launch.SAVE_SECONDS`)."""
SILENT_SECONDS: Final = 120.0
"""After which a tracker that says nothing is said to hang."""

logger = logging.getLogger("tuneward_trainer.tracking")


class Tracking:
    """The trackers of one gang; none on workers other than the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def start(cls, plan: Plan, plan_path: Path, folder: Path, run: Path) -> Tracking:
        found = cls(folder)
        asked = plan.request.spec.trackers
        if asked is None or os.environ.get("JOB_COMPLETION_INDEX", "0") != "0":
            return found
        for name in asked.asked():
            command = [sys.executable, "-m", "tuneward_trainer.trackers", name, str(plan_path), str(folder), str(run)]
            try:
                # A group of its own: Ctrl-C is not for it, and what it starts is ended with it.
                found._processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            except OSError as error:
                logger.warning("the tracker %s could not be started: %s", name, error)
        return found

    def end(self) -> list[TrackerState]:
        """What became of them. Takes END_SECONDS at most."""
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        late = {name for name, process in self._processes.items() if not _ended(process, deadline)}
        known = {state.name: state for state in states(self._folder)}
        return [_last(name, known.get(name), process, name in late) for name, process in self._processes.items()]


def _ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    late = process.returncode is None
    # Also where it has ended: wandb leaves a service behind.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits for a device does not even end by this, and must not keep the launcher.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    return not late


def _last(name: str, known: TrackerState | None, process: subprocess.Popen[bytes], late: bool) -> TrackerState:
    state = known or TrackerState(name=name)
    if late:
        state = state.model_copy(
            update={"message": f"ended after {END_SECONDS:.0f} s without an answer: the last steps may be missing there"}
        )
    elif process.returncode and not state.message:
        state = state.model_copy(update={"message": f"its process ended with exit code {process.returncode}"})
    if state.message:
        logger.warning("%s: %s", name, state.message)
    return state


@contextlib.contextmanager
def tracked(plan: Plan, plan_path: Path, folder: Path, run: Path) -> Iterator[Tracking]:
    """Whatever happens inside, nothing is left running."""
    tracking = Tracking.start(plan, plan_path, folder, run)
    try:
        yield tracking
    finally:
        for process in tracking._processes.values():
            if process.returncode is None:
                _ended(process, 0.0)


def states(folder: Path) -> list[TrackerState]:
    """What the trackers last said."""
    return [_heard(values) for file in sorted(folder.glob("tracker-*.json")) if (values := _read(file)) is not None]


def _read(file: Path) -> Mapping[str, object] | None:
    with contextlib.suppress(OSError, ValueError):
        values: Mapping[str, object] = json.loads(file.read_text())
        return values
    return None


def _heard(values: Mapping[str, object]) -> TrackerState:
    state = TrackerState.model_validate(values)
    silent = time.time() - float(str(values.get("at", 0)))
    if silent > SILENT_SECONDS and not state.message:
        # Whole minutes, so that status is not written for every second.
        return state.model_copy(update={"message": f"no word from it for {silent // 60:.0f} min; it may hang"})
    return state
