"""How far a pass over all files came, so that a process that is killed costs some seconds of it and not all.

Beside the parts of the cache that is being made lies journal.json: up to which line of which file everything is written,
how long the cache's files were by then, and what had been found. Who goes on cuts them to that length and reads on.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tuneward_api.manifest import write_synced
from tuneward_trainer.data.documents import holds
from tuneward_trainer.data.gathered import Gathered, Part, SourceCounts, Summary
from tuneward_trainer.data.problems import Lines, Problem, Problems

log = logging.getLogger(__name__)

JOURNAL: Final = "journal.json"


@dataclass(frozen=True)
class Reached:
    """Up to `line` of the file at index `file`, of the source at index `source` of a part; `sizes`: bytes of its files."""

    part: Part
    source: int
    file: int
    line: int
    sizes: dict[str, int] = field(default_factory=dict)


def save(folder: Path, reached: Reached, found: Gathered) -> None:
    """`sizes` must be on the disk."""
    value = {
        "reached": asdict(reached),
        "read": found.read,
        "summary": asdict(found.summary),
        "fates": {fate: _lists(lines) for fate, lines in found.fates.items()},
        "bad": _lists(found.problems.bad),
        "broken": found.problems.broken,
        "count": found.problems.count,
        "kept": [asdict(problem) for problem in found.problems.kept],
    }
    write_synced(folder / JOURNAL, json.dumps(value).encode())


def load(folder: Path, found: Gathered) -> Reached | None:
    """Fills `found`, or leaves it as it is and gives None where there is nothing to go on from."""
    try:
        value = json.loads((folder / JOURNAL).read_bytes())
        reached = Reached(**value["reached"])
        if not holds(folder / reached.part, reached.sizes):
            return None
        problems = [Problem(**problem) for problem in value["kept"]]
        sources = [SourceCounts(**counts) for counts in value["summary"]["sources"]]
        before = Gathered(
            problems=Problems(problems, value["count"], _lines(value["bad"]), value["broken"]),
            summary=Summary(**{**value["summary"], "sources": sources}),
            fates={fate: _lines(lists) for fate, lists in value["fates"].items()},
            read=value["read"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found.problems, found.summary, found.fates, found.read = before.problems, before.summary, before.fates, before.read
    log.info("going on behind %d samples that are tokenized already", found.read)
    return reached


def remove(folder: Path) -> None:
    (folder / JOURNAL).unlink(missing_ok=True)


def _lists(lines: Lines) -> dict[str, list[int]]:
    return {file: numbers.tolist() for file, numbers in lines.by_file.items()}


def _lines(lists: Mapping[str, Any]) -> Lines:
    return Lines({file: array("q", numbers) for file, numbers in lists.items()})
