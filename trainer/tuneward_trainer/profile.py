"""A trace of some steps, for a person who asks where their time goes: `tuneward train --profile 3-5`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneward_api.names import ENV_PROFILE
from tuneward_trainer.rundir import attempt_directory

logger = logging.getLogger("tuneward_trainer")


@dataclass
class Profile:
    """Of the leader's rank, steps `first` to `last` as they are counted in the log (from 1)."""

    first: int
    last: int
    folder: Path
    _profiler: Any = field(default=None, init=False)

    @classmethod
    def asked(cls, run: Path, attempt: int) -> Profile | None:
        """What TUNEWARD_PROFILE says, FROM-TO; None if nothing."""
        steps = os.environ.get(ENV_PROFILE)
        if not steps:
            return None
        first, _, last = steps.partition("-")
        return cls(int(first), int(last or first), attempt_directory(run, attempt))

    @property
    def file(self) -> Path:
        """For https://ui.perfetto.dev or chrome://tracing."""
        return self.folder / f"trace-{self.first}-{self.last}.json.gz"

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Call it around each step, counted from 1."""
        if step == self.first:
            self._start()
        try:
            yield
        finally:
            if step == self.last:
                self.close()

    def _start(self) -> None:
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def close(self) -> None:
        """Writes what there is, if anything; a trace that cannot be written costs no training."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        try:
            profiler.export_chrome_trace(str(self.file))
        except (OSError, RuntimeError) as error:
            logger.warning("the trace %s was not written: %s", self.file, error)
        else:
            logger.info("trace of steps %d to %d: %s (open it in ui.perfetto.dev)", self.first, self.last, self.file)
