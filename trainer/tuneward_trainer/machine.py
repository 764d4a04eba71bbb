"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def processors() -> int:
    """That this process may use: affinity, and the cgroup's quota rounded up."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)
