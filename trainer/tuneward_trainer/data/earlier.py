"""Documents that an earlier cache holds already, by the content that they were made of.

A file to which lines were added is another file, and its cache another one; but the lines that it had give the same tokens
as before. So each sample has an address, 128 bits of what stands in the file and how it is read, and one whose address is in
a cache of the same tokenizer is copied from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data.documents import Documents, Encoded, mapped
from tuneward_trainer.data.formats import Format

log = logging.getLogger(__name__)

Address: TypeAlias = tuple[int, int]
"""Two times 64 bits."""
NOWHERE: Address = (0, 0)
"""Of a sample that nobody may find: what was cut depends on more than its content."""
_ORDER: Final = "order.i64"
_SORTED: Final = "sorted.u64"


class Addresses:
    """Of samples that are read as one format, with one naming of fields."""

    def __init__(self, form: Format | None, fields: Mapping[str, str]) -> None:
        self._read_as = hashlib.blake2b(json.dumps([form, sorted(fields.items())]).encode() + b"\n", digest_size=16)

    def of(self, content: bytes | dict[str, Any]) -> Address:
        """`content`: a line, or a row as Python's values."""
        found = self._read_as.copy()
        found.update(content if isinstance(content, bytes) else repr(content).encode())
        digest = found.digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class Earlier:
    """Parts of caches, opened where they are first asked: what goes to another process is their names."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = tuple(folders)
        self._parts: list[_Part] | None = None

    def __reduce__(self) -> tuple[type[Earlier], tuple[tuple[Path, ...]]]:
        return Earlier, (self._folders,)

    def find(self, address: Address, longest: int) -> list[Encoded] | None:
        """The documents of a sample, if none has more than `longest` tokens."""
        if self._parts is None:
            self._parts = [part for folder in self._folders if (part := _open(folder)) is not None]
        for part in self._parts:
            documents = part.find(address)
            if documents is not None:
                return documents if max(map(len, documents)) <= longest else None
        return None


def let_find(folder: Path) -> None:
    """Lets the documents of a part be found: their addresses in order, and whose they are."""
    addresses = Documents.open(folder).column("addresses")
    order = np.argsort(addresses, kind="stable")
    order.astype("<i8").tofile(folder / _ORDER)
    addresses[order].astype("<u8").tofile(folder / _SORTED)


class _Part:
    """Nothing of it is in memory but the pages that are looked at, which processes share."""

    def __init__(self, folder: Path) -> None:
        self._documents = Documents.open(folder)
        self._order: NDArray[np.int64] = mapped(folder / _ORDER, "<i8")
        self._sorted: NDArray[np.uint64] = mapped(folder / _SORTED, "<u8")

    def find(self, address: Address) -> list[Encoded] | None:
        wanted = np.uint64(address[0])
        at = int(np.searchsorted(self._sorted, wanted))
        if at == len(self._sorted) or self._sorted[at] != wanted:
            return None
        index = int(self._order[at])
        documents = self._documents
        if int(documents.column("checks")[index]) != address[1]:
            return None
        # A sample's documents stand together, and its copies behind them begin where it began.
        place, starts, stop = documents.place(index), documents.column("starts"), index + 1
        while stop < len(documents) and documents.place(stop) == place and starts[stop] > starts[stop - 1]:
            stop += 1
        return [Encoded(one.ids, one.weights) for one in map(documents.__getitem__, range(index, stop))]


def _open(folder: Path) -> _Part | None:
    """None where it is gone or broken: then its samples are made again."""
    try:
        return _Part(folder)
    except (OSError, ValueError) as error:
        log.info("the earlier cache %s is not used: %s", folder, error)
        return None
