"""TensorBoard's event file of one attempt: scalars by step, and nothing that a training would have to load for them.

Why not by the `tensorboard` package: docs/decisions/0011. The format is TensorFlow's `core/util/event.proto` and
`core/framework/summary.proto`, framed as a TFRecord; a test reads it with TensorBoard itself.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

FOLDER: Final = "tensorboard"
"""Below the run directory: all attempts are one run."""

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_START: Final = 1
"""SessionLog.SessionStatus."""


class EventFile:
    """<run>/tensorboard/events.out.tfevents.<attempt>.tuneward, in whose order TensorBoard reads them."""

    def __init__(self, run: Path, attempt: int, from_step: int) -> None:
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes the number for a time; it sorts by it and shows the one in each event.
        self._file = (folder / f"events.out.tfevents.{attempt:010d}.tuneward").open("ab", buffering=0)
        self._append(_field(3, _BYTES, b"brain.Event:2"))
        # Readers forget what an earlier attempt said of this step and later ones: they are made again.
        again = from_step + 1 if from_step else 0
        self._append(_field(2, _VARINT, again) + _field(7, _BYTES, _field(1, _VARINT, _START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [_field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, value) for tag, value in values.items()]
        self._append(_field(2, _VARINT, step) + _field(5, _BYTES, b"".join(_field(1, _BYTES, one) for one in scalars)))

    def _append(self, event: bytes) -> None:
        """Raises OSError where the disk is full."""
        # In one write, so that a kill leaves no half of it before another record; nor does a full disk.
        whole = record(_field(1, _DOUBLE, time.time()) + event)
        written = self._file.write(whole)
        if written < len(whole):
            self._file.truncate(self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


def _field(number: int, wire: int, value: float | int | bytes) -> bytes:
    key = _varint(number << 3 | wire)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if wire == _VARINT:
        return key + _varint(int(value))
    return key + struct.pack("<d" if wire == _DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def record(body: bytes) -> bytes:
    """TFRecord: length, its checksum, the body, its checksum."""
    length = struct.pack("<Q", len(body))
    return length + _masked(length) + body + _masked(body)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_TABLE: Final = [_entry(index) for index in range(256)]


def crc32c(data: bytes) -> int:
    """Castagnoli's, RFC 3720 B.4; the standard library has only the other one."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
