"""Ends what a job or a person waits for where it stands still, with a sentence: the wait would be for ever.

The work is done by a child that is forked before anything heavy is loaded. So the parent can look and speak whatever holds
the child: a store that does not answer, processes that wait for each other, a lock in C that lets no other thread run. What
counts as work is time on a processor, of the child and of all that it started; where it rightly waits for somebody else, it
tells that this one goes on (`tell`).
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Final

from tuneward_api.finetunejob import RunPolicy
from tuneward_api.names import DEFAULT_HANG_SECONDS, ExitCode

LEAST_SHARE: Final = 0.001
"""Of one processor: reading a megabyte a second from a slow store takes more, and threads that look at a clock less."""
LOOK_SECONDS: Final = 5.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG: Final = 1
_TICKS: Final = os.sysconf("SC_CLK_TCK")

_told = mmap.mmap(-1, 8)
"""A number that parent and child share."""


def tell() -> None:
    """What this process waits for goes on: bytes came over the network, or the owner of a lock is alive."""
    _told[:] = (int.from_bytes(_told[:], "big") + 1).to_bytes(8, "big")


def supervised(command: str, work: Callable[[], int], say: Callable[[str], object], policy: RunPolicy | None = None) -> int:
    """Does `work` in a child and returns its exit code, or 75 after it stood still for hangTimeoutSeconds and was killed
    with all that it started; `say` gets the sentence then. `policy`: of the job; None where there is none."""
    seconds = (policy.hang_timeout_seconds if policy is not None else None) or DEFAULT_HANG_SECONDS
    # No signal may come when nobody would hand it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = multiprocessing.get_context("fork").Process(target=_work, args=(work, os.getpid()))
    child.start()
    assert child.pid is not None
    for number in _SIGNALS:
        signal.signal(number, _handing_on(child.pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if _worked(child, seconds):
        code = child.exitcode or 0
        return code if code >= 0 else 128 - code
    _end(child)
    say(sentence(command, seconds, of_job=policy is not None))
    return ExitCode.TRY_AGAIN


def sentence(command: str, seconds: int, *, of_job: bool) -> str:
    remedy = "see whether the store's volume and the network answer"
    if of_job:
        remedy += ", and raise spec.runPolicy.hangTimeoutSeconds if they are only slow"
    return f"{command} stood still for {seconds} s and was ended; {remedy} (its log says where it stood)"


def _work(work: Callable[[], int], parent: int) -> None:
    """In the child."""
    # A session of its own: a signal to the parent's group comes once, by the parent.
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    sys.exit(work())


def _handing_on(pid: int) -> Callable[[int, FrameType | None], None]:
    def hand_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    return hand_on


def _worked(child: BaseProcess, seconds: float) -> bool:
    """Waits for its end; False as soon as it has stood still for so long."""
    before, since = _work_of(child), time.monotonic()
    while True:
        child.join(min(LOOK_SECONDS, seconds / 10))
        if child.exitcode is not None:
            return True
        now = _work_of(child)
        if now is None or before is None or moved(before, now, LEAST_SHARE * seconds):
            before, since = now, time.monotonic()
        elif time.monotonic() - since >= seconds:
            return False


def moved(before: tuple[float, bytes], now: tuple[float, bytes], least: float) -> bool:
    # Less than before: a process has ended that somebody else reaped.
    return now[1] != before[1] or now[0] < before[0] or now[0] - before[0] >= least


def _work_of(child: BaseProcess) -> tuple[float, bytes] | None:
    """Seconds on processors, and what the child told. None: /proc is not ours, and nothing can be said."""
    spent = family(child.pid or 0)
    return (sum(spent.values()), _told[:]) if spent else None


def family(root: int) -> dict[int, float]:
    """A child of ours and what descends from it: seconds on processors, also of what has ended and was waited for."""
    seconds: dict[int, float] = {}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = file.read_text().rpartition(")")[2].split()
            pid = int(file.parent.name)
            children[int(fields[1])].append(pid)
            seconds[pid] = sum(map(int, fields[11:15])) / _TICKS  # utime, stime, cutime, cstime: proc_pid_stat(5)
    found: dict[int, float] = {}
    left = [root] if root in children[os.getpid()] else []
    while left:
        pid = left.pop()
        found[pid] = seconds.get(pid, 0.0)
        left += children[pid]
    return found


def _end(child: BaseProcess) -> None:
    """Has it write where it stands, then kills it and what it started."""
    assert child.pid is not None
    # The signal may wake and end the child, and what it started is then nobody's.
    known = family(child.pid)
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGUSR1)
    child.join(2)
    for pid in known | family(child.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # One that waits for a device does not even end by this, and must not keep us.
    child.join(5)
