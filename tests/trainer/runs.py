"""Run directories written by hand: attempts with a start and lines of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuneward_trainer.metrics import MetricsLog

Lines = list[dict[str, Any]]

RETRAINED: dict[int, tuple[int, Lines]] = {
    1: (0, [{"step": 0, "validation_loss": 9.0}, *({"step": step, "train_loss": 1 + step / 10} for step in (1, 2, 3))]),
    2: (2, [{"step": step, "train_loss": 2 + step / 10} for step in (3, 4, 5)]),
    3: (3, [*({"step": step, "train_loss": 3 + step / 10} for step in (4, 5, 6)), {"step": 6, "validation_loss": 0.5}]),
}
"""Attempts by number: the checkpoint's step, and what was written. The second and the third train some steps again."""
JOINED = {1: 1.1, 2: 1.2, 3: 2.3, 4: 3.4, 5: 3.5, 6: 3.6}
"""What a reader of all three sees: train losses by step."""


def attempt(run: Path, number: int, from_step: int, lines: Lines) -> Path:
    folder = run / "attempts" / str(number)
    folder.mkdir(parents=True)
    (folder / "start.json").write_text(json.dumps({"attempt": number, "fromStep": from_step}))
    if lines:
        log = MetricsLog(run, number, from_step)
        for line in lines:
            log.write(**line)
        log.close()
    return folder
