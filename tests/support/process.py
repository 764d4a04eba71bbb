"""Processes that a test starts: none is waited for, or read from, without a deadline."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import AnyStr


@contextmanager
def killed_after(seconds: float, process: subprocess.Popen[AnyStr]) -> Iterator[None]:
    """For a read of its output: it is killed if the block takes longer, and the output then ends."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def bounded(process: subprocess.Popen[AnyStr], *, seconds: float = 120) -> Iterator[subprocess.Popen[AnyStr]]:
    """Until the end of the block, and no longer than this. (Popen's own block waits for its end, also after a failure.)"""
    try:
        with killed_after(seconds, process):
            yield process
    finally:
        process.kill()
        process.wait(timeout=30)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
