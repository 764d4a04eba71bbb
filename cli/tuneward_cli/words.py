"""Sentences of the command, made from status and progress; pure, so that a table can test them.

`tuneward train` and `tuneward watch` go through the same functions: one vocabulary for both doors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneward_api.conditions import Phase
from tuneward_api.files import Progress
from tuneward_api.quantities import duration

_LOSS_OF_NOTE = 700.0
"""Nats. The exponential of more is no double."""
_DOING: dict[str, str] = {
    Phase.PENDING: "waits for the operator",
    Phase.VALIDATING: "checks model and data, tokenizes",
    Phase.QUEUED: "waits for quota",
    Phase.STARTING: "starts its workers",
    Phase.RUNNING: "trains",
    Phase.RECOVERING: "starts again from its newest checkpoint",
    Phase.SUSPENDED: "is suspended",
    Phase.CANCELLING: "is being cancelled",
    Phase.REGISTERING: "checks and files the result",
    Phase.SUCCEEDED: "ended in a model",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "was cancelled",
}


@dataclass(frozen=True)
class Seen:
    """What a bar or a line shows; the same from `status.progress` and from GET /progress."""

    step: int
    steps: int
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    memory_bytes: int | None = None
    mfu: float | None = None
    reward_accuracy: float | None = None
    """Of a preference job: share of the last step's pairs that it gets right."""
    trackers: tuple[str, ...] = ()
    """A line for each tracker that has said something."""

    @classmethod
    def of(cls, progress: Mapping[str, Any] | None) -> Seen:
        """From `status.progress` or from the JSON of GET /progress: both spell their fields alike."""
        found = progress or {}
        return cls(
            step=int(found.get("step") or 0),
            steps=int(found.get("steps") or 0),
            loss=found.get("trainLoss"),
            reward_accuracy=found.get("rewardAccuracy"),
            tokens_per_second=found.get("tokensPerSecond"),
            eta_seconds=found.get("etaSeconds"),
            memory_bytes=found.get("memoryBytes"),
            mfu=found.get("mfu"),
            trackers=tuple(
                tracker_line(state) for state in found.get("trackers") or () if state.get("message") or state.get("url")
            ),
        )


def progress_line(seen: Seen) -> str:
    """`step 12/25, loss 1.234, 310 tokens/s, 41s to go`; what is not known is left out."""
    parts = [f"step {seen.step}/{seen.steps}" if seen.steps else "no step yet"]
    if seen.loss is not None:
        parts.append(f"loss {seen.loss:.3f}")
    if seen.reward_accuracy is not None:
        parts.append(f"{seen.reward_accuracy:.0%} of the pairs right")
    if seen.tokens_per_second:
        parts.append(f"{seen.tokens_per_second:,.0f} tokens/s")
    if seen.mfu:
        parts.append(f"{seen.mfu:.0%} MFU")
    if seen.memory_bytes:
        parts.append(gibibytes(seen.memory_bytes))
    if seen.eta_seconds is not None and seen.step < seen.steps:
        parts.append(f"{duration(seen.eta_seconds)} to go")
    return ", ".join(parts)


def stopping_line(progress: Progress | None) -> str:
    """What Ctrl-C does to an attempt that is so far; None: it does not answer."""
    if progress is None:
        return "stopping: its processes save what they have, and end (Ctrl-C again ends them at once)"
    # Steps are reported from the first one on, and the one that is under way is ended.
    if progress.step or progress.phase == "Training":
        return "stopping: a checkpoint is being saved (Ctrl-C again gives up on it)"
    return "stopping: this attempt has made no step, so there is nothing to save (Ctrl-C again ends it at once)"


def tracker_line(state: Mapping[str, Any]) -> str:
    """`wandb: https://…`, or why it has not got all figures."""
    return f"{state['name']}: {state.get('message') or state.get('url') or 'no run yet'}"


def size(count: float) -> str:
    """Bytes for people: `268 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def gibibytes(count: float) -> str:
    """Memory for people: `13.5 GiB`, `0.02 GiB`."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 30):.2f} GiB"


def phase_line(name: str, phase: str | None, message: str | None = None) -> str:
    """`lantern: Running (trains): step 3/25`."""
    known = phase or Phase.PENDING
    text = f"{name}: {known} ({_DOING.get(known, 'is in a phase that this version does not know')})"
    return f"{text}: {message}" if message else text


def job_line(job: Mapping[str, Any]) -> str:
    """One line for a FineTuneJob as it is now."""
    status = job.get("status") or {}
    phase = status.get("phase")
    progress = status.get("progress")
    detail = status.get("message") or ""
    if phase == Phase.RUNNING and progress:
        detail = progress_line(Seen.of(progress))
    return phase_line(job["metadata"]["name"], phase, detail)


def condition(resource: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of that type, or an empty one."""
    found = (resource.get("status") or {}).get("conditions") or []
    return next((item for item in found if item.get("type") == kind), {})


def accuracy_line(before: float | None, after: float | None) -> str | None:
    """`held-out tokens that it would write: 41% before, 98% after`."""
    if before is None or after is None:
        return None
    return f"held-out tokens that it would write: {before:.0%} before, {after:.0%} after"


def perplexity_line(before: float, after: float) -> str:
    """`perplexity 28.5 before, 1.9 after`: e to the power of the losses, which are nats a token."""
    return f"perplexity {_perplexity(before)} before, {_perplexity(after)} after"


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, _LOSS_OF_NOTE))
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def score_line(before: float | None, after: float | None) -> str | None:
    """`answers that count: 12% before, 88% after`, where a task was graded."""
    if after is None:
        return None
    return f"answers that count: {f'{before:.0%} before, ' if before is not None else ''}{after:.0%} after"


def chosen_line(step: int, steps: int) -> str | None:
    """`step 16 of 30 became the model: …`, where `evaluation.patience` took another state than the last."""
    if step >= steps:
        return None
    return f"step {step} of {steps} became the model: it had the lowest validation loss"


def losses_line(before: float | None, after: float | None, train: float | None) -> str:
    """`validation loss 3.41 before, 0.62 after; training loss 0.05`."""
    parts = []
    if before is not None and after is not None:
        parts.append(f"validation loss {before:.3f} before, {after:.3f} after")
    if train is not None:
        parts.append(f"training loss {train:.3f}")
    return "; ".join(parts) or "no loss was measured"
