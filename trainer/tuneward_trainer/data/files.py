"""Lines of .jsonl, .jsonl.gz and .jsonl.zst, and rows of .parquet, as people really have them.

Byte order marks, CRLF, blank lines, a missing last newline, several gzip members and bytes after the last one are read
without a word. Lines end at \\n only: U+2028 and U+0085 are ordinary characters inside a JSON string.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from tuneward_trainer.data import tables
from tuneward_trainer.data.calls import unique
from tuneward_trainer.data.problems import SampleError, show

ENDINGS: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONGEST_LINE: Final = 1 << 26
"""Bytes. A longer line is a file of another kind."""
_CHUNK: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"
_JSONL: Final = "UTF-8 text with one JSON object a line"


def data_files(path: Path) -> list[Path]:
    """The file, or all data files of a folder in the order of their names. Hidden files are left out."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and not file.name.startswith("."))
    return [path]


def read(path: Path) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(number from 1, line or row) of each sample; what the file is, its first bytes say.

    Raises SampleError where the file itself is broken.
    """
    with path.open("rb") as file:
        is_table = file.read(len(tables.PARQUET)) == tables.PARQUET
    return tables.read_rows(path) if is_table else read_lines(path)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank. Raises SampleError where the file itself is broken."""
    number = 0
    for number, line in enumerate(_split(_chunks(path)), 1):
        line = line.removeprefix(_BOM).strip(b" \t\r\n")
        if line:
            yield number, line


def parse(line: bytes | dict[str, Any]) -> dict[str, Any]:
    """One line's object; a table's row is one already. Raises SampleError."""
    if isinstance(line, dict):
        return line
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line[:4]:
        raise SampleError("", "is UTF-16 or UTF-32", f"{_JSONL}; convert with: iconv -f UTF-16 -t UTF-8")
    try:
        text = line.decode()
        # Of each object that is read: a partial costs no Python call of its own.
        value = json.loads(text, object_pairs_hook=partial(unique, path="", text=text))
    except UnicodeDecodeError as error:
        raise SampleError("", f"is no UTF-8 at byte {error.start + 1}", _JSONL) from error
    except (ValueError, RecursionError) as error:
        hint = "; the file looks like one JSON array: write jq -c '.[]' FILE" if line.startswith(b"[") else ""
        raise SampleError("", f"is no JSON ({error})", _JSONL + hint) from error
    if not isinstance(value, dict):
        kind = "a JSON array: write jq -c '.[]' FILE" if isinstance(value, list) else show(value)
        raise SampleError("", f"is {kind}", _JSONL)
    return value


def _split(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        yield from lines
        if len(rest) > LONGEST_LINE:
            raise SampleError("the file", f"has a line of more than {LONGEST_LINE} bytes", _JSONL)
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == tables.ZSTD:
            yield from tables.unzstd(path)
        elif magic.startswith(_GZIP):
            yield from _gunzip(file)
        else:
            while chunk := file.read(_CHUNK):
                yield chunk


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """All members, as `gzip -dc` does, which also ignores what stands behind the last one."""
    left = b""
    while True:
        left = left.lstrip(b"\0") or file.read(_CHUNK)
        if len(left) < len(_GZIP):
            left += file.read(_CHUNK)
        if not left.startswith(_GZIP):
            return
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not left:
                raise SampleError("the file", "ends in the middle of its gzip stream", "a whole file; copy it again")
            try:
                yield member.decompress(left)
            except zlib.error as error:
                raise SampleError("the file", f"is a broken gzip stream ({error})", "a whole file; copy it again") from error
            left = member.unused_data or (b"" if member.eof else file.read(_CHUNK))
