"""What a training measures, step by step: metrics.jsonl and TensorBoard's events, and how readers join attempts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tuneward_trainer.events import EventFile
from tuneward_trainer.rundir import attempt_directory, attempt_numbers

FILE: Final = "metrics.jsonl"
_LEFT_OUT: Final = ("step", "eta_seconds")
_VALIDATION: Final = "validation_"

Line = dict[str, Any]

logger = logging.getLogger("tuneward_trainer")


class MetricsLog:
    """attempts/<n>/metrics.jsonl: one line a step, and one a validation. Steps that an earlier attempt made again occur
    twice over all attempts; readers key by step. The same goes to TensorBoard."""

    def __init__(self, run: Path, number: int, from_step: int = 0) -> None:
        self._file = (attempt_directory(run, number) / FILE).open("a", buffering=1)
        self._events = EventFile(run, number, from_step)
        self._missed = False

    def write(self, *, step: int, **values: float | int | None) -> None:
        line: Line = {"step": step, **values}
        kept = {name: value for name, value in line.items() if value is not None and math.isfinite(value)}
        try:
            self._file.write(json.dumps(kept) + "\n")
            self._events.write(step, tags(kept))
        except OSError as error:
            # The training itself goes on, as it does where a checkpoint is not saved.
            if not self._missed:
                logger.error("the figures of step %d and later ones may be missing: %s", step, error)
            self._missed = True

    def close(self) -> None:
        self._file.close()
        self._events.close()


def tags(line: Mapping[str, float]) -> dict[str, float]:
    """A line's figures as trackers group them: train_loss -> train/loss, validation_loss -> validation/loss."""
    found = {}
    for name, value in line.items():
        if name.startswith(_VALIDATION):
            found[f"validation/{name.removeprefix(_VALIDATION)}"] = float(value)
        elif name not in _LEFT_OUT:
            found[f"train/{name.removeprefix('train_')}"] = float(value)
    return found


def parse(text: str) -> Iterator[Line]:
    """A line that a kill has cut is none."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def history(run: Path, before: int) -> list[Line]:
    """Of the attempts below number `before`: what the attempt of that number goes on from, each step once."""
    lines: list[Line] = []
    for number in [known for known in attempt_numbers(run) if known < before] + [before]:
        first = _from_step(run, number)
        # What was measured before the first step is measured again by an attempt that begins there.
        lines = [line for line in lines if line["step"] <= first and first]
        if number != before:
            lines += parse(_text(attempt_directory(run, number) / FILE))
    return lines


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _from_step(run: Path, number: int) -> int:
    try:
        start = json.loads((attempt_directory(run, number) / "start.json").read_bytes())
        return int(start["fromStep"])
    except (OSError, ValueError, KeyError):
        return 0
