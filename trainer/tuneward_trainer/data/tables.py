"""Rows of Parquet files and bytes of Zstandard files: what pyarrow reads for us, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tuneward_trainer.data.problems import SampleError

PARQUET: Final = b"PAR1"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
_ROWS: Final = 256
_CHUNK: Final = 1 << 20
_WHOLE: Final = "a whole file; copy it again"


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of each row of a Parquet file; memory holds some pages of one row group.

    Raises SampleError where the file itself is broken.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # Without a buffer size a column of a row group is read whole, and row groups may be gigabytes.
        with ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (ArrowException, OSError) as error:
        raise SampleError("the file", f"is a broken Parquet file ({_first_line(error)})", _WHOLE) from error


def _without_nulls(value: Any) -> Any:
    """A table writes a null for each field that only other rows have: such fields are absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def unzstd(path: Path) -> Iterator[bytes]:
    """All frames of a Zstandard file, one after the other. Raises SampleError where it is broken."""
    from pyarrow import ArrowException, CompressedInputStream, OSFile

    try:
        with OSFile(str(path)) as file, CompressedInputStream(file, "zstd") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (ArrowException, OSError) as error:
        raise SampleError("the file", f"is a broken zstd stream ({_first_line(error)})", _WHOLE) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
