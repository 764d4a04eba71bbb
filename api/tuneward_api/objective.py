"""What a job learns of its samples. Beside finetunejob.py, which holds the rest of the spec."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tuneward_api.base import Model, Rule

ObjectiveType = Literal["SFT", "Pretraining"]


class Objective(Model):
    """What is learnt of the samples."""

    type: ObjectiveType | None = Field(
        None,
        description="SFT (default) learns the answers of conversations, completions, and texts. "
        "Pretraining learns every token of Text samples, and splits those that are longer than sequenceLength.",
    )


class ResolvedObjective(Model):
    """The objective with every default chosen."""

    type: ObjectiveType = Field(description="What is learnt of the samples.")


SUPERVISED = ResolvedObjective(type="SFT")
"""Of plans that were made when there was no other."""


def kind_of(spec: Any) -> ObjectiveType:
    """The objective of a FineTuneJob's spec."""
    return (spec.objective.type if spec.objective is not None else None) or "SFT"


def _formats(spec: Any) -> set[str]:
    """Formats that the data sets of a spec name."""
    sources = [*spec.datasets.training, *(spec.datasets.validation or [])]
    return {source.format for source in sources if source.format is not None}


def _cel(wanted: str, condition: str) -> str:
    """CEL: `condition` holds where the objective's type is `wanted`."""
    return f"!has(self.objective) || !has(self.objective.type) || self.objective.type != '{wanted}' || ({condition})"


def _cel_formats(only: str) -> str:
    """CEL: no data set names another format than `only`."""
    own = f"all(d, !has(d.format) || d.format == '{only}')"
    return f"self.datasets.training.{own} && (!has(self.datasets.validation) || self.datasets.validation.{own})"


RULES = (
    Rule(
        cel=_cel("Pretraining", _cel_formats("Text")),
        message="objective.type Pretraining learns Text samples; no source of datasets may have another format",
        check=lambda s: kind_of(s) != "Pretraining" or _formats(s) <= {"Text"},
    ),
    Rule(
        cel=_cel("Pretraining", "!has(self.datasets.lossOn)"),
        message="objective.type Pretraining learns every token; leave datasets.lossOn out",
        check=lambda s: kind_of(s) != "Pretraining" or s.datasets.loss_on is None,
    ),
)
"""Of FineTuneJobSpec: what an objective asks of the data."""
