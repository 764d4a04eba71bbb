"""The tokenized samples on disk: `data/<digest>/{training,validation}/`.

Documents are cached, not packs: a pack is a pure function of lengths, seed and epoch (packing.py), so another seed,
sequence length or number of workers needs no new cache. All files are flat arrays in little-endian order, so that
opening costs nothing and any number of processes share the pages:

    ids.i32      token ids of all documents, one after the other
    weights.f16  weights[i] is the loss weight of *predicting* ids[i] from what stands before it; 0 at a document's start
    starts.i64   one entry for each document: where its ids begin
    lengths.i32  one entry for each document: number of its ids
    files.i32    one entry for each document: index into files.json, the source it came from
    lines.i32    one entry for each document: line in that source, from 1
    files.json   addresses of the sources

A data set's `weight` repeats entries, not ids.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

TRAINING: Final = "training"
VALIDATION: Final = "validation"
_COLUMNS: Final = {
    "ids": ("ids.i32", "<i4"),
    "weights": ("weights.f16", "<f2"),
    "starts": ("starts.i64", "<i8"),
    "lengths": ("lengths.i32", "<i4"),
    "files": ("files.i32", "<i4"),
    "lines": ("lines.i32", "<i4"),
}
_SOURCES: Final = "files.json"


@dataclass(frozen=True)
class Document:
    """One sample: `ids` int32 [length], `weights` float16 [length], and where it came from."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float16]
    file: str
    line: int


class Documents:
    """Read-only view of one part. `lengths` is int32 [number of documents]."""

    def __init__(self, columns: dict[str, NDArray[Any]], sources: list[str]) -> None:
        self._columns = columns
        self.sources = sources
        self.lengths: NDArray[np.int32] = columns["lengths"]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Maps the files of a part. Raises FileNotFoundError if one is missing."""
        columns = {name: _map(folder / file, dtype) for name, (file, dtype) in _COLUMNS.items()}
        return cls(columns, json.loads((folder / _SOURCES).read_text()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        start = int(self._columns["starts"][index])
        span = slice(start, start + int(self.lengths[index]))
        return Document(
            ids=self._columns["ids"][span],
            weights=self._columns["weights"][span],
            file=self.sources[int(self._columns["files"][index])],
            line=int(self._columns["lines"][index]),
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def source(self, index: int) -> tuple[int, int]:
        """(index of the file, line) of a document, without its ids."""
        return int(self._columns["files"][index]), int(self._columns["lines"][index])

    def start(self, index: int) -> int:
        """Place of the document's first id; copies share it."""
        return int(self._columns["starts"][index])

    def places(self) -> NDArray[np.int32]:
        """(index of the file, line) of every document: int32 [documents, 2]."""
        return np.stack([self._columns["files"], self._columns["lines"]], axis=1)

    def tokens(self) -> int:
        """Tokens of one epoch, copies counted."""
        return int(self.lengths.sum(dtype=np.int64))

    def target_tokens(self) -> int:
        """Tokens of one epoch with a loss weight that is not 0, copies counted."""
        counts = np.concatenate([[0], np.cumsum(self._columns["weights"] != 0, dtype=np.int64)])
        starts = self._columns["starts"]
        return int((counts[starts + self.lengths] - counts[starts]).sum())


def _map(path: Path, dtype: str) -> NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class DocumentWriter:
    """Appends documents to a part's files; memory does not grow with their number. Use as a context manager."""

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SOURCES).write_text(json.dumps(list(sources), ensure_ascii=False, indent=1) + "\n")
        # Closed in __exit__: the writer itself is the context manager.
        self._files = {name: (folder / file).open("wb") for name, (file, _) in _COLUMNS.items()}
        self._written = 0

    def add(self, ids: Sequence[int], weights: Sequence[float], *, file: int, line: int, copies: int = 1) -> None:
        """`weights[i]` belongs to `ids[i]`; weights[0] must be 0, as nothing stands before the first token."""
        if len(ids) != len(weights) or not ids or weights[0]:
            raise ValueError("a document needs as many weights as ids, at least one, and 0 as its first weight")
        self._files["ids"].write(_little(array("i", ids)))
        self._files["weights"].write(struct.pack(f"<{len(weights)}e", *weights))
        for name, value, form in (
            ("starts", self._written, "<q"),
            ("lengths", len(ids), "<i"),
            ("files", file, "<i"),
            ("lines", line, "<i"),
        ):
            self._files[name].write(struct.pack(form, value) * copies)
        self._written += len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()


def _little(values: array[int]) -> bytes:
    return np.asarray(values, dtype="<i4").tobytes()


def keep(folder: Path, wanted: NDArray[np.bool_]) -> None:
    """Drops the index entries of a part that are not `wanted` (bool [documents]); ids stay where they are."""
    for name in ("starts", "lengths", "files", "lines"):
        file, dtype = _COLUMNS[name]
        entries = np.fromfile(folder / file, dtype)
        entries[wanted].tofile(folder / file)
