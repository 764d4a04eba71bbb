"""What a worker reports of its ranks: its exit code, its termination message, and what is kept of the attempt.

A rank that fails leaves its reason in the status folder, the leader's rank leaves the result, and a rank that was killed
leaves nothing but its signal and the last lines of its log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tuneward_api import curves, names
from tuneward_api.conditions import Reason
from tuneward_api.files import Plan, Result
from tuneward_api.names import MAX_MESSAGE, ExitCode
from tuneward_trainer import memory, nccl, rundir
from tuneward_trainer.progress import read_ranks

LOG_LINES: Final = 200
"""Of each rank that are kept in attempts/<n>/logs."""
_LAST_BYTES: Final = 1 << 16

logger = logging.getLogger("tuneward_trainer.launch")


@dataclass(frozen=True)
class Outcome:
    """How the agent says that the ranks ended: by global rank, exit code or minus the signal. Empty: all were well."""

    exit_codes: Mapping[int, int]
    stopped: bool = False
    """This worker was told to stop."""
    error: str = ""
    """The agent itself failed, before any rank ran."""
    said: Mapping[int, str] = field(default_factory=dict)
    """By global rank, what those that failed last wrote on stderr."""


def conclude(plan: Plan, run: Path, folder: Path, outcome: Outcome, *, out_of_memory: bool) -> Result:
    """The result of the attempt, written if it is this worker that knows it.

    In this order: the first rank here that failed by itself; what the leader's rank left; a rank killed from outside;
    another worker's word; this worker's own guess.
    """
    number = attempt_number(folder)
    failures = sorted(_endings(folder), key=lambda ending: float(ending["at"]))
    first = next((ending for ending in failures if not ending["secondary"]), None)
    if first is not None:
        return _write(plan, run, folder, Reason(first["reason"]), first["message"], first["exit_code"], replace=True)
    if number and not outcome.exit_codes and not outcome.error:
        left = rundir.await_result(run, number, seconds=0 if outcome.stopped else 5)
        if left is not None:
            return left
    killed = {rank: -code for rank, code in outcome.exit_codes.items() if code < 0}
    if killed or out_of_memory:
        return _write(plan, run, folder, *_killed(plan, killed, outcome, out_of_memory), replace=False)
    left = rundir.await_result(run, number, seconds=3) if number and not outcome.error and not outcome.stopped else None
    if left is not None:
        return left
    return _write(plan, run, folder, *_guess(outcome, failures), replace=False)


def _killed(plan: Plan, killed: dict[int, int], outcome: Outcome, out_of_memory: bool) -> tuple[Reason, str, int]:
    if out_of_memory:
        # The worker's own memory; what a GPU lacks is an exception in the rank.
        remedy = memory.remedy(plan, rundir.directory(names.ENV_MODEL_DIR), None)
        return Reason.OUT_OF_MEMORY, f"a rank was killed for memory; {remedy}", 1
    known = nccl.aborted({rank: outcome.said.get(rank, "") for rank, number in killed.items() if number == signal.SIGABRT})
    if known is not None:
        return known
    rank, number = min(killed.items())
    return Reason.INFRASTRUCTURE, f"rank {rank} was killed by {signal.Signals(number).name}", ExitCode.TRY_AGAIN


def _guess(outcome: Outcome, failures: list[dict[str, Any]]) -> tuple[Reason, str, int]:
    if outcome.stopped:
        return Reason.PREEMPTED, "stopped on request before the first step", ExitCode.STOPPED
    if outcome.error:
        return Reason.INFRASTRUCTURE, outcome.error, ExitCode.TRY_AGAIN
    if failures:
        return Reason(failures[0]["reason"]), failures[0]["message"], failures[0]["exit_code"]
    codes = ", ".join(f"rank {rank}: {code}" for rank, code in sorted(outcome.exit_codes.items()))
    if set(outcome.exit_codes.values()) == {ExitCode.TRY_AGAIN}:
        said = f"the ranks ask for another try and could not leave word why ({codes}); is there room on this machine's disk?"
        return Reason.INFRASTRUCTURE, said, ExitCode.TRY_AGAIN
    return Reason.UNKNOWN, f"the ranks ended without a word ({codes or 'exit code 0 and no result'}); their logs say why", 1


def _write(plan: Plan, run: Path, folder: Path, reason: Reason, message: str, exit_code: int, *, replace: bool) -> Result:
    """A gang without a number leaves no file."""
    result = failed(plan, folder, reason, message, exit_code)
    if not result.attempt:
        return result
    try:
        return rundir.write_result(run, result, replace=replace)
    except OSError as error:
        logger.error("the result could not be written: %s", error)
        return result


def failed(plan: Plan, folder: Path, reason: Reason, message: str, exit_code: int) -> Result:
    """Made of what the ranks last reported."""
    last = next(iter(read_ranks(folder)), {})
    return Result.model_validate(
        {
            **{key: last[key] for key in ("step", "steps", "checkpoint", "fromStep", "resume", "node") if key in last},
            "attempt": attempt_number(folder),
            "podUID": os.environ.get(names.ENV_POD_UID, ""),
            "planDigest": plan.digest(),
            "outcome": "Stopped" if exit_code == ExitCode.STOPPED else "Failed",
            "exitCode": exit_code,
            "reason": reason,
            "message": message[:MAX_MESSAGE],
            "step": last.get("step", 0),
            "steps": last.get("steps", plan.prepared.hyperparameters.steps),
            "finishedAt": rundir.now(),
        }
    )


def attempt_number(folder: Path) -> int:
    """That the ranks of this worker were told; 0 if the gang never got so far."""
    return max((int(rank.get("attempt", 0)) for rank in read_ranks(folder)), default=0)


def _endings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in folder.glob("ending-*.json")]


def keep_logs(run: Path, folder: Path, number: int) -> None:
    """The last lines of each rank's log, and NCCL's traces, for good."""
    if not number:
        return
    target = rundir.attempt_directory(run, number) / "logs"
    with contextlib.suppress(OSError):
        target.mkdir(parents=True, exist_ok=True)
        for place in sorted({file.parent for file in (folder / "logs").rglob("std*.log")}):
            lines = [line for file in sorted(place.glob("std*.log")) for line in _tail(file)]
            worker = os.environ.get("JOB_COMPLETION_INDEX", "0")
            (target / f"worker-{worker}-rank-{place.name}.log").write_text("".join(lines))
        for trace in folder.glob(f"{nccl.TRACE}*"):
            shutil.copyfile(trace, target / trace.name)


def last_words(folder: Path, local_rank: int) -> str:
    """The end of what a rank of this worker wrote on stderr, C++'s stacks among it; empty where nothing is left."""
    file = next((folder / "logs").rglob(f"{local_rank}/stderr.log"), None)
    if file is None:
        return ""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LAST_BYTES))
        return stream.read().decode(errors="replace")


def draw_losses(run: Path, plan: Plan) -> None:
    """<run>/loss.svg, of all attempts so far; by the leader's worker, however the attempt ended."""
    if os.environ.get("JOB_COMPLETION_INDEX", "0") == "0":
        with contextlib.suppress(OSError):
            curves.draw(run, f"{plan.request.job.name}: loss by step")


def _tail(file: Path) -> list[str]:
    with file.open(errors="replace") as stream:
        return stream.readlines()[-LOG_LINES:]
