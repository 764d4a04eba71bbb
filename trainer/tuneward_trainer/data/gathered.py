"""What a pass over all files found: counts by source and in all, what is wrong, what was too long."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from tuneward_trainer.data import formats
from tuneward_trainer.data.fit import Fate
from tuneward_trainer.data.problems import Lines, Problem, Problems

Part: TypeAlias = Literal["training", "validation"]
SUMMARY: Final = "summary.json"


@dataclass
class SourceCounts:
    """What one source gives to a part. Tokens are those of one epoch, copies counted; samples are counted once."""

    uri: str
    part: Part
    files: int = 1
    format: formats.Format | None = None
    samples: int = 0
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    split: int = 0
    truncated: int = 0
    skipped: int = 0
    invalid: int = 0


@dataclass
class Summary:
    """What was found, in all and by source; counted as SourceCounts are."""

    samples: int = 0
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    validation_samples: int = 0
    longest: int = 0
    duplicates: int = 0
    in_both: int = 0
    split: int = 0
    truncated: int = 0
    skipped: int = 0
    invalid: int = 0
    ignored_fields: dict[str, int] = field(default_factory=dict)
    sources: list[SourceCounts] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What is no error but worth a line."""
        found = [
            (self.duplicates, "samples occur more than once"),
            (self.in_both, "validation samples are training samples too: the validation loss flatters"),
            (self.split, "samples were split, as they are longer than sequenceLength"),
            (self.truncated, "samples were cut at their end"),
            (self.skipped, "samples were left out as too long"),
            (self.invalid, "samples were left out as invalid (invalidSampleSkipPercentage); errors.txt names them"),
        ]
        fields = [(count, f"samples have the field {name}, which is ignored") for name, count in self.ignored_fields.items()]
        return [f"{count} {text}" for count, text in found + fields if count]

    @classmethod
    def read(cls, folder: Path) -> Summary:
        found = json.loads((folder / SUMMARY).read_text())
        return cls(**{**found, "sources": [SourceCounts(**counts) for counts in found["sources"]]})


@dataclass
class Gathered:
    """What a pass over all files found, good and bad. `read`: lines; `fates`: samples that were too long."""

    problems: Problems = field(default_factory=Problems)
    summary: Summary = field(default_factory=Summary)
    fates: dict[Fate, Lines] = field(default_factory=dict)
    read: int = 0
    skip_percentage: float = 0.0

    @property
    def refused(self) -> bool:
        """Whether there is more wrong than may be left out."""
        return bool(self.problems.broken) or len(self.problems.bad) * 100 > self.skip_percentage * self.read

    def add_unless_refused(self, problem: Problem) -> None:
        """What may only follow from other problems is said where there are none."""
        if not self.refused:
            self.problems.add_broken(problem)
