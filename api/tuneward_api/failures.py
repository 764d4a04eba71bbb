"""One table: how a process ended -> what kind of failure it was -> how often it is tried again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tuneward_api.conditions import FailureClass, Reason
from tuneward_api.names import ExitCode
from tuneward_api.quantities import to_bytes
from tuneward_api.resolved import Resolved

KILLED_FOR_MEMORY = (
    "the worker was killed for memory; raise spec.workers.resources.limits.memory "
    "or lower spec.hyperparameters.sequenceLength"
)
"""What the kubelet's word alone tells; `with_values` knows more."""
SIGKILL_CODES = frozenset({-9, 137})

DEFAULT_RETRIES: dict[FailureClass, int] = {
    FailureClass.INVALID_INPUT: 0,
    FailureClass.INVALID_CONFIG: 0,
    FailureClass.OUT_OF_MEMORY: 1,
    FailureClass.INFRASTRUCTURE: 10,
    # Losing a node to a more important job is nobody's fault and costs no budget that matters.
    FailureClass.PREEMPTED: 1000,
    FailureClass.HANG: 3,
    FailureClass.NUMERICAL_DIVERGENCE: 1,
    FailureClass.USER_CODE: 1,
    FailureClass.UNKNOWN: 3,
}

REASON_CLASS: dict[Reason, FailureClass] = {
    Reason.DATA_INVALID: FailureClass.INVALID_INPUT,
    Reason.INPUT_MISSING: FailureClass.INVALID_INPUT,
    Reason.STORE_NOT_WRITABLE: FailureClass.INVALID_CONFIG,
    Reason.CONFIG_INVALID: FailureClass.INVALID_CONFIG,
    Reason.MODEL_UNSUPPORTED: FailureClass.INVALID_CONFIG,
    Reason.OUT_OF_MEMORY: FailureClass.OUT_OF_MEMORY,
    Reason.NUMERICAL_DIVERGENCE: FailureClass.NUMERICAL_DIVERGENCE,
    Reason.HANG: FailureClass.HANG,
    Reason.INFRASTRUCTURE: FailureClass.INFRASTRUCTURE,
    Reason.PREEMPTED: FailureClass.PREEMPTED,
    Reason.USER_CODE: FailureClass.USER_CODE,
}


_REASONS: dict[str | None, Reason] = {str(reason): reason for reason in Reason}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended a process, in the words of status."""

    failure_class: FailureClass
    reason: Reason
    sentence: str


def classify(*, exit_code: int | None, reason: str | None = None, message: str | None = None) -> Failure:
    """`exit_code` as the kubelet or `waitpid` gives it (137 and -9 are both SIGKILL; None: the pod vanished),
    `reason` as the process reported it or as the kubelet says it (OOMKilled, Evicted, DeadlineExceeded), and `message` of
    the same."""
    if reason in _REASONS:
        known = _REASONS[reason]
        if known in REASON_CLASS:
            return Failure(
                failure_class=REASON_CLASS[known],
                reason=known,
                sentence=message or f"the worker ended with {known}",
            )
    if reason == "OOMKilled":
        return Failure(
            failure_class=FailureClass.OUT_OF_MEMORY,
            reason=Reason.OUT_OF_MEMORY,
            sentence=KILLED_FOR_MEMORY,
        )
    if reason in ("Evicted", "Preempting", "TerminationByKubelet", "NodeLost", "NodeShutdown"):
        return Failure(
            failure_class=FailureClass.INFRASTRUCTURE,
            reason=Reason.INFRASTRUCTURE,
            sentence=f"the node ended the worker ({reason}{f': {message}' if message else ''})",
        )
    return _by_exit_code(exit_code, message)


def hang(*, step: int, seconds: int) -> Failure:
    """Of a gang whose leader answers, and has said the same step for so long."""
    return Failure(
        failure_class=FailureClass.HANG,
        reason=Reason.HANG,
        sentence=f"no step for {seconds} s after step {step}, though the leader answers; raise "
        "spec.runPolicy.hangTimeoutSeconds if a step may take so long",
    )


def with_values(failure: Failure, resolved: Resolved | None, *, limit: int | str | None) -> Failure:
    """A worker that was killed for memory left no word: which values would do comes from the estimate and its `limit`."""
    if resolved is None or resolved.estimate is None or KILLED_FOR_MEMORY not in failure.sentence:
        return failure
    had = to_bytes(limit) if limit is not None else 0
    more = math.ceil(1.25 * max(resolved.estimate.memory_bytes, had) / (1 << 30))
    length = resolved.hyperparameters.sequence_length
    told = (
        f"the worker was killed for memory; raise spec.workers.resources.limits.memory to {more}Gi "
        f"or lower spec.hyperparameters.sequenceLength from {length} to {length // 2}"
    )
    return replace(failure, sentence=failure.sentence.replace(KILLED_FOR_MEMORY, told))


def _by_exit_code(exit_code: int | None, message: str | None) -> Failure:
    if exit_code is None:
        return Failure(
            failure_class=FailureClass.INFRASTRUCTURE,
            reason=Reason.INFRASTRUCTURE,
            sentence="a worker's pod vanished",
        )
    fixed = {
        ExitCode.DATA_BAD: (FailureClass.INVALID_INPUT, Reason.DATA_INVALID, "the data is bad"),
        ExitCode.INPUT_MISSING: (FailureClass.INVALID_INPUT, Reason.INPUT_MISSING, "an input is missing"),
        ExitCode.TRY_AGAIN: (
            FailureClass.INFRASTRUCTURE,
            Reason.INFRASTRUCTURE,
            "the worker asked for another try",
        ),
        ExitCode.CONFIG_BAD: (FailureClass.INVALID_CONFIG, Reason.CONFIG_INVALID, "the configuration is bad"),
        ExitCode.STOPPED: (
            FailureClass.PREEMPTED,
            Reason.PREEMPTED,
            "the worker was told to stop and saved a checkpoint",
        ),
    }
    if exit_code in fixed:
        failure_class, known, sentence = fixed[ExitCode(exit_code)]
        return Failure(failure_class=failure_class, reason=known, sentence=message or sentence)
    if exit_code in SIGKILL_CODES:
        return Failure(
            failure_class=FailureClass.INFRASTRUCTURE,
            reason=Reason.INFRASTRUCTURE,
            sentence="a worker was killed (SIGKILL)",
        )
    return Failure(
        failure_class=FailureClass.UNKNOWN,
        reason=Reason.UNKNOWN,
        sentence=message or f"a worker ended with exit code {exit_code}; its log says why",
    )
