"""The good samples of files that hold bad ones, as files of their own: what is trained on is decided by a person."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneward_trainer.data.files import ENDINGS, read
from tuneward_trainer.data.problems import SampleError

_SCHEME: Final = "://"


@dataclass(frozen=True)
class Corrected:
    """`path` holds the good lines of the file at address `file`, as JSON lines; None: it has none. `left_out`: the
    lines that are not there, in order."""

    file: str
    path: Path | None
    samples: int
    left_out: list[int]


def targets(files: Sequence[tuple[str, Path]], folder: Path) -> dict[str, Path]:
    """Where each file's good lines go below `folder`: as its address has it (pvc://CLAIM/PATH -> CLAIM/PATH), or its
    path from the folder that is common to all that were named."""
    local = {uri: Path(os.path.normpath(path.absolute())) for uri, path in files if _SCHEME not in uri}
    common = os.path.commonpath([path.parent for path in local.values()]) if local else ""
    names = {uri: os.path.relpath(local[uri], common) if uri in local else uri.partition(_SCHEME)[2] for uri, _ in files}
    plain = [_json_lines(name) for name in names.values()]
    return {
        uri: folder / (_json_lines(name) if plain.count(_json_lines(name)) == 1 else f"{name}.jsonl")
        for uri, name in names.items()
    }


def _json_lines(name: str) -> str:
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    return f"{name.removesuffix(ending)}.jsonl"


def write_good(file: str, source: Path, target: Path, bad: Iterable[int]) -> Corrected:
    """Lines as they stand, rows as JSON. A file that is broken after a line is written up to it.

    Raises FileExistsError: nothing is overwritten.
    """
    left_out = sorted(set(bad))
    unwanted, written = set(left_out), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as output:
        try:
            for line, content in read(source):
                if line not in unwanted:
                    output.write((content if isinstance(content, bytes) else _row(content)) + b"\n")
                    written += 1
        except SampleError:
            pass  # that the file is broken is one of its problems
    if not written:
        target.unlink()
    return Corrected(file, target if written else None, written, left_out)


def _row(row: dict[str, Any]) -> bytes:
    """Dates and the like, which only columns that nothing reads can hold, as text."""
    return json.dumps(row, ensure_ascii=False, default=str).encode()
