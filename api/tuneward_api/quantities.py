"""Quantities: of memory as Kubernetes writes them, of time and work as people read them."""

from __future__ import annotations

import math
import re
from typing import Final

_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}


def to_bytes(quantity: int | str) -> int:
    """4Gi, 512M, 1e9; the schema has checked the form. Raises ValueError for anything else."""
    match = re.match(r"^\+?([0-9.]+)(e[0-9]+|E[0-9]+)?([a-zA-Z]*)$", str(quantity))
    if match is None or match[3] not in _UNITS:
        raise ValueError(f"{quantity!r} is no quantity of memory")
    return int(float(match[1] + (match[2] or "")) * _UNITS[match[3]])


def duration(seconds: float) -> str:
    """`41s`, `3m05s`, `2h04m`, `3d05h`: two units at most, as kubectl has it."""
    whole = max(0, math.ceil(seconds))
    for size, name, below, digits in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // below:02d}{digits}"
    return f"{whole}s"


def operations(count: float) -> str:
    """Floating-point operations: `2.61 TFLOP`."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} ZFLOP"
