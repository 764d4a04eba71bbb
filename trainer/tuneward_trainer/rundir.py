"""The run directory: what every attempt left there, and the exclusive creation that numbers the next one."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.files import Plan, Report, Result, Start, canonical_json, termination_message
from tuneward_api.manifest import write_synced

ATTEMPTS: Final = "attempts"

logger = logging.getLogger(__name__)


def directory(variable: str) -> Path:
    """The folder that an environment variable names, or its place in a pod."""
    return Path(os.environ.get(variable) or names.DEFAULT_DIRS[variable])


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_plan(path: Path) -> Plan:
    return Plan.model_validate_json(path.read_bytes())


def attempt_directory(run: Path, number: int) -> Path:
    return run / ATTEMPTS / str(number)


def attempt_numbers(run: Path) -> list[int]:
    """Ascending; a gang that died before it had a number left none."""
    try:
        found = [int(entry.name) for entry in (run / ATTEMPTS).iterdir() if entry.name.isdecimal()]
    except FileNotFoundError:
        return []
    return sorted(found)


def take_attempt(run: Path, start: Start) -> int:
    """The next number, taken by exclusive creation of start.json; `start.attempt` is set to it. Two gangs at once get
    two numbers, also on a network file system."""
    number = max(attempt_numbers(run), default=0) + 1
    while True:
        folder = attempt_directory(run, number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / "start.json").open("x") as file:
                file.write(canonical_json(start.model_copy(update={"attempt": number}).to_json()) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            number += 1
        else:
            return number


def superseded(run: Path, number: int) -> int | None:
    """The number of a later attempt, if one has begun: the fence."""
    newest = max(attempt_numbers(run), default=number)
    return newest if newest > number else None


def read_result(run: Path, number: int) -> Result | None:
    try:
        return Result.model_validate_json((attempt_directory(run, number) / "result.json").read_bytes())
    except (OSError, ValidationError):
        return None


def results(run: Path, plan_digest: str) -> list[Result]:
    """Of this plan, newest attempt first."""
    found = (read_result(run, number) for number in reversed(attempt_numbers(run)))
    return [result for result in found if result is not None and result.plan_digest == plan_digest]


def terminal_result(run: Path, plan_digest: str) -> Result | None:
    """The verdict that a later attempt reports again. A success counts before a refusal."""
    found = [result for result in results(run, plan_digest) if result.terminal]
    return next((result for result in found if result.outcome == "Succeeded"), found[0] if found else None)


def write_result(run: Path, result: Result, *, replace: bool = True) -> Result:
    """Writes attempts/<n>/result.json. An existing one stays and is returned where `replace` is false, and where it is a
    success: what was made is on the disk then, and a rank that fails on its way out takes nothing of it away."""
    folder = attempt_directory(run, result.attempt)
    existing = read_result(run, result.attempt)
    if existing is not None and (not replace or existing.outcome == "Succeeded"):
        return existing
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder / "result.json", (canonical_json(result.to_json()) + "\n").encode())
    return result


def await_result(run: Path, number: int, *, seconds: float) -> Result | None:
    """The result that another process of the gang is about to write."""
    deadline = time.monotonic() + seconds
    while (result := read_result(run, number)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def report(message: Report | Result) -> None:
    """Leaves `message` where the kubelet finds it; on a workstation nobody made that file unless a variable names it."""
    named = os.environ.get(names.ENV_TERMINATION_LOG)
    path = Path(named or names.DEFAULT_TERMINATION_LOG)
    if named or path.exists():
        path.write_text(termination_message(message))


def leave(run: Path, number: int, name: str, value: dict[str, Any]) -> None:
    """attempts/<n>/<name>, to look at; a store that cannot take it hides no verdict."""
    try:
        (attempt_directory(run, number) / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        logger.error("%s was not written: %s", name, error)
