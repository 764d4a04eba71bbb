"""The tokenized samples on disk: `data/<digest>/{training,validation}/`.

Documents are cached, not packs: a pack is a pure function of lengths, seed and epoch (packing.py), so another seed,
sequence length or number of workers needs no new cache. All files are flat arrays in little-endian order, so that
opening costs nothing and any number of processes share the pages:

    ids.i32      token ids of all documents, one after the other
    weights.f16  weights[i] is the loss weight of *predicting* ids[i] from what stands before it; 0 at a document's start
    starts.i64   one entry for each document: where its ids begin
    lengths.i32  one entry for each document: number of its ids
    targets.i32  one entry for each document: number of its ids with a loss weight that is not 0
    digests.u64  one entry for each document: of the whole sample that it is of, so that equal samples are seen
    files.i32    one entry for each document: index into files.json, the source it came from
    lines.i32    one entry for each document: line in that source, from 1
    addresses.u64  one entry for each document: of the content that its sample was made of (earlier.py), 0 where it was cut
    checks.u64   one entry for each document: the other 64 bits of it
    files.json   addresses of the sources

A data set's `weight` repeats a sample's entries, not ids. The two documents of a pair (objective DPO) lie side by side, the
chosen one first, so that documents 2i and 2i + 1 are pair i. Where tokens are only counted (`tuneward validate`), ids and
weights are left out: everything but `Documents[i]` still holds.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Place: TypeAlias = tuple[str, int]
"""(address of the file, line from 1)."""
TRAINING: Final = "training"
VALIDATION: Final = "validation"
_COLUMNS: Final = {
    "ids": ("ids.i32", "<i4"),
    "weights": ("weights.f16", "<f2"),
    "starts": ("starts.i64", "<i8"),
    "lengths": ("lengths.i32", "<i4"),
    "targets": ("targets.i32", "<i4"),
    "digests": ("digests.u64", "<u8"),
    "files": ("files.i32", "<i4"),
    "lines": ("lines.i32", "<i4"),
    "addresses": ("addresses.u64", "<u8"),
    "checks": ("checks.u64", "<u8"),
}
_TOKENS: Final = ("ids", "weights")
_INDEX: Final = tuple(name for name in _COLUMNS if name not in _TOKENS)
_SOURCES: Final = "files.json"
_PENDING: Final = 8192
"""Entries of the index that are written at once."""


def packed(numbers: Sequence[int]) -> bytes:
    """A tokenizer's list as the files hold it; numpy takes twice as long."""
    return struct.pack(f"<{len(numbers)}i", *numbers)


def ids_of(numbers: Sequence[int] | bytes) -> NDArray[np.int32]:
    """A tokenizer's list, or what is packed already, as int32 [length]."""
    return np.frombuffer(numbers if isinstance(numbers, bytes) else packed(numbers), _COLUMNS["ids"][1])


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """A document as the files hold it: `ids` int32 [length] and `weights` float16 [length], of which the first is 0."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float16]

    @classmethod
    def of(cls, ids: Sequence[int], weights: Sequence[float]) -> Self:
        """Raises ValueError where `weights[i]` does not belong to `ids[i]`, or the first is not 0."""
        if len(ids) != len(weights) or not ids or weights[0]:
            raise ValueError("a document needs as many weights as ids, at least one, and 0 as its first weight")
        return cls(ids_of(ids), np.asarray(weights, _COLUMNS["weights"][1]))

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Encoded)
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.weights, other.weights)
        )

    def __reduce__(self) -> tuple[Any, tuple[bytes, bytes]]:
        """Between processes bytes take a tenth of what arrays take."""
        return _unpickled, (self.ids.tobytes(), self.weights.tobytes())


def _unpickled(ids: bytes, weights: bytes) -> Encoded:
    return Encoded(np.frombuffer(ids, _COLUMNS["ids"][1]), np.frombuffer(weights, _COLUMNS["weights"][1]))


@dataclass(frozen=True)
class Document:
    """One sample: `ids` int32 [length], `weights` float16 [length], and where it came from."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float16]
    file: str
    line: int


class Documents:
    """Read-only view of one part. Arrays have one entry for each document: `lengths` and `targets` (its tokens, and
    those with a loss weight) int32, `digests` uint64, `files` (index into `sources`) and `lines` int32."""

    def __init__(self, columns: dict[str, NDArray[Any]], sources: list[str]) -> None:
        self._columns = columns
        self.sources = sources
        self.lengths: NDArray[np.int32] = columns["lengths"]
        self.targets: NDArray[np.int32] = columns["targets"]
        self.digests: NDArray[np.uint64] = columns["digests"]
        self.files: NDArray[np.int32] = columns["files"]
        self.lines: NDArray[np.int32] = columns["lines"]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Maps the files of a part. Raises FileNotFoundError if one is missing."""
        columns = {name: mapped(folder / file, dtype) for name, (file, dtype) in _COLUMNS.items()}
        return cls(columns, json.loads((folder / _SOURCES).read_text()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        span = self.span(index)
        file, line = self.place(index)
        return Document(self._columns["ids"][span], self._columns["weights"][span], file, line)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def span(self, index: int) -> slice:
        """Where the document's ids stand; copies share them."""
        start = int(self._columns["starts"][index])
        return slice(start, start + int(self.lengths[index]))

    def originals(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indices of the documents that are no copy of an earlier one, ascending; and for each document, which of those it
        is."""
        _, first, which = np.unique(self._columns["starts"], return_index=True, return_inverse=True)
        return first, which

    def samples(self) -> NDArray[np.intp]:
        """Index of the first document of each sample: those of one sample stand together."""
        places = np.stack([self.files, self.lines], axis=1)
        return np.flatnonzero(np.concatenate([[True], (places[1:] != places[:-1]).any(axis=1)])[: len(places)])

    def place(self, index: int) -> Place:
        """Where a document comes from, without its ids."""
        return self.sources[int(self.files[index])], int(self.lines[index])

    def column(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def tokens(self) -> int:
        """Tokens of one epoch, copies counted."""
        return int(self.lengths.sum(dtype=np.int64))

    def target_tokens(self) -> int:
        """Tokens of one epoch with a loss weight that is not 0, copies counted."""
        return int(self.targets.sum(dtype=np.int64))


def mapped(path: Path, dtype: str) -> NDArray[Any]:
    """A flat array, page by page as it is read."""
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class DocumentWriter:
    """Appends documents to a part's files; memory does not grow with their number. Use as a context manager.

    `keep_tokens`: whether ids and weights are written, or only counted. `sizes`: what `sync` said, to go on from there.
    """

    def __init__(
        self, folder: Path, sources: Sequence[str], *, keep_tokens: bool = True, sizes: Mapping[str, int] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SOURCES).write_text(json.dumps(list(sources), ensure_ascii=False, indent=1) + "\n")
        # Closed in __exit__: the writer itself is the context manager.
        mode = "wb" if sizes is None else "r+b"
        self._files = {name: (folder / file).open(mode) for name, (file, _) in _COLUMNS.items()}
        self._keep_tokens = keep_tokens
        self._pending: dict[str, list[int]] = {name: [] for name in _INDEX}
        self._written = 0
        if sizes is not None:
            self._written = sizes["ids"] // np.dtype(_COLUMNS["ids"][1]).itemsize
            for name, file in self._files.items():
                file.truncate(sizes[name])
                file.seek(sizes[name])

    def add(self, ids: Sequence[int], weights: Sequence[float], *, file: int, line: int) -> None:
        """A sample of one document."""
        self.add_sample([Encoded.of(ids, weights)], file=file, line=line)

    def add_sample(
        self,
        documents: Sequence[Encoded],
        *,
        file: int,
        line: int,
        copies: int = 1,
        digest: int = 0,
        address: tuple[int, int] = (0, 0),
    ) -> None:
        """All of that `copies` times. `digest`: 64 bits of the sample; `address`: of the content that it was made of."""
        entries = []
        for document in documents:
            if self._keep_tokens:
                self._files["ids"].write(document.ids.tobytes())
                self._files["weights"].write(document.weights.tobytes())
            entries.append((len(document), int(np.count_nonzero(document.weights)), digest, file, line, *address))
        self._enter(entries, copies)

    def copy(self, documents: Documents, index: int) -> None:
        """A document of another part that has the same sources."""
        if self._keep_tokens:
            for name in _TOKENS:
                self._files[name].write(documents.column(name)[documents.span(index)].tobytes())
        self._enter([tuple(int(documents.column(name)[index]) for name in _INDEX if name != "starts")], 1)

    def _enter(self, entries: Sequence[tuple[int, ...]], copies: int) -> None:
        """Entries of all columns of the index but `starts`, in their order."""
        *starts, self._written = accumulate((entry[0] for entry in entries), initial=self._written)
        whole = [(start, *entry) for start, entry in zip(starts, entries, strict=True)] * copies
        for name, values in zip(_INDEX, zip(*whole, strict=True), strict=True):
            self._pending[name].extend(values)
        if len(self._pending["starts"]) > _PENDING:
            self._flush()

    def _flush(self) -> None:
        for name, values in self._pending.items():
            self._files[name].write(np.asarray(values, _COLUMNS[name][1]).tobytes())
            values.clear()

    def sync(self) -> dict[str, int]:
        """Bytes of each file, which are on the disk by then."""
        self._flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._flush()
        finally:
            for file in self._files.values():
                file.close()


def holds(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether all files of a part are at least as long."""
    paths = {name: folder / file for name, (file, _) in _COLUMNS.items()}
    return all(path.is_file() and path.stat().st_size >= sizes[name] for name, path in paths.items())


def keep(folder: Path, wanted: NDArray[np.bool_]) -> None:
    """Drops the index entries of a part that are not `wanted` (bool [documents]); ids stay where they are."""
    for name in _INDEX:
        file, dtype = _COLUMNS[name]
        entries = np.fromfile(folder / file, dtype)
        entries[wanted].tofile(folder / file)
