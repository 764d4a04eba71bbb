"""How NCCL is told to behave, and what it means when its watchdog ends a rank.

On a GPU a collective that never ends is noticed by a thread of torch's (the watchdog), which aborts the process: no Python
exception, only SIGABRT and lines on stderr. The launcher sets the deadlines before and reads these lines after. (It must
not load torch for that.)
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tuneward_api.conditions import Reason
from tuneward_api.files import Plan
from tuneward_api.names import DEFAULT_HANG_SECONDS, ExitCode

TRACE: Final = "nccl-trace-"
"""Followed by a rank: what torch's flight recorder kept of its last collectives, for `torchfrtrace`."""


_LEAST_SECONDS: Final = 60
"""Even a first step of a small job may take some."""


def hang_seconds(plan: Plan) -> int | None:
    """spec.runPolicy.hangTimeoutSeconds, if it says something."""
    policy = plan.request.spec.run_policy
    return policy.hang_timeout_seconds if policy is not None else None


def step_timeout(hang_seconds: int | None) -> datetime.timedelta:
    """How long a collective of a step waits, of NCCL or of gloo. A peer that died is noticed at once; this is for one that
    hangs.

    Half of spec.runPolicy.hangTimeoutSeconds: a rank waits after its own part of a step, and shall say what it waited for
    before the operator, which only sees that no step comes, takes the gang down.
    """
    return datetime.timedelta(seconds=max(_LEAST_SECONDS, (hang_seconds or DEFAULT_HANG_SECONDS) // 2))


def environment(hang_seconds: int | None, folder: Path) -> dict[str, str]:
    """Variables of ranks on GPUs, for torch's ProcessGroupNCCL. `hang_seconds`: spec.runPolicy.hangTimeoutSeconds; traces go
    to `folder`. Whatever a profile says goes before."""
    return {
        # End the process whose collective failed or took too long; 3: without cleaning up first, which can hang as well.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        # The same for a watchdog that gets no answer from the driver.
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": f"{step_timeout(hang_seconds).total_seconds():.0f}",
        # Collectives that the flight recorder remembers, and writes down when one takes too long.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / TRACE),
    }


Ended = tuple[Reason, str, int]
"""Reason, sentence, exit code of the worker."""


def _failed_gpu(found: re.Match[str]) -> Ended:
    if "device-side assert" in found[1]:
        return Reason.USER_CODE, f"was ended by an assertion in a GPU's kernel ({found[1]})", 1
    look = "look at that node's GPU (Xid in its kernel log) before it is used again"
    return Reason.INFRASTRUCTURE, f"lost its GPU ({found[1]}); {look}", ExitCode.TRY_AGAIN


def _failed_network(found: re.Match[str]) -> Ended:
    said = found[1].rstrip(" .")
    return (
        Reason.INFRASTRUCTURE,
        f"lost the others: NCCL says {said}; a worker went away, or the network",
        ExitCode.TRY_AGAIN,
    )


def _waited(found: re.Match[str]) -> Ended:
    what, seconds = found[1].strip("_").lower(), round(int(found[2]) / 1000)
    return (
        Reason.HANG,
        f"waited {seconds} s for the others in {what}: one of them hangs, or the network; the attempt's logs hold what each "
        f"did last ({TRACE}*), and the limit is half of spec.runPolicy.hangTimeoutSeconds",
        ExitCode.TRY_AGAIN,
    )


def _stuck(found: re.Match[str]) -> Ended:
    return (
        Reason.HANG,
        f"got no answer from its GPU's driver for {found[1]} s; look at that node's GPU (Xid in its kernel log)",
        ExitCode.TRY_AGAIN,
    )


_MEANINGS: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Ended]], ...]] = (
    # The most telling first: where one rank loses its GPU, the others only wait.
    (re.compile(r"watchdog thread terminated with exception: .*?CUDA error: ([^\n]+)"), _failed_gpu),
    (re.compile(r"\b(nccl(?:System|Remote|UnhandledCuda|Internal)Error: [^\n]+)"), _failed_network),
    (re.compile(r"collective operation timeout: WorkNCCL\([^\n]*?OpType=(\w+)[^\n]*? ran for (\d+) milliseconds"), _waited),
    (re.compile(r"watchdog got stuck for (\d+) seconds"), _stuck),
)
"""What torch 2.11 to 2.15 write on stderr, and what it means."""


def aborted(said: Mapping[int, str]) -> Ended | None:
    """Of ranks that ended by SIGABRT, by what they last wrote on stderr; None where none of it is NCCL's."""
    for pattern, meaning in _MEANINGS:
        for rank, text in sorted(said.items()):
            found = pattern.search(text)
            if found is not None:
                reason, sentence, code = meaning(found)
                return reason, f"rank {rank} {sentence}", code
    return None
