"""What a job learns of its samples. Beside finetunejob.py, which holds the rest of the spec."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from tuneward_api.base import Model, Rule

ObjectiveType = Literal["SFT", "Pretraining", "DPO"]
PAIRS: Final = ("Preference", "PreferredOutput")
"""Formats whose samples are two answers to one prompt."""


class DPO(Model):
    """How preferences are learnt (Rafailov et al. 2023, arXiv 2305.18290)."""

    beta: float | None = Field(
        None,
        gt=0,
        le=100,
        description="How much an answer's gain in log-probability over the model that the job starts from counts: "
        "the larger, the nearer to that model the result stays. Default: 0.1.",
    )


class Objective(Model):
    """What is learnt of the samples."""

    type: ObjectiveType | None = Field(
        None,
        description="SFT (default) learns the answers of conversations, completions, and texts. "
        "Pretraining learns every token of Text samples, and splits those that are longer than sequenceLength. "
        "DPO learns to prefer one of two answers, from Preference and PreferredOutput samples.",
    )
    dpo: DPO | None = Field(None, description="How preferences are learnt. Only with type DPO.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.dpo) || (has(self.type) && self.type == 'DPO')",
            message="dpo belongs to type DPO; set type to DPO, or leave dpo out",
            check=lambda s: s.dpo is None or s.type == "DPO",
        ),
    )


class ResolvedDPO(Model):
    """The same with every default chosen."""

    beta: float = Field(description="How much a gain over the reference counts.")


class ResolvedObjective(Model):
    """The objective with every default chosen."""

    type: ObjectiveType = Field(description="What is learnt of the samples.")
    dpo: ResolvedDPO | None = Field(None, description="How preferences are learnt, of type DPO.")


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


def _cel_formats(allowed: str) -> str:
    """CEL: every format that a data set names fulfils `allowed`."""
    own = f"all(d, !has(d.format) || {allowed})"
    return f"self.datasets.training.{own} && (!has(self.datasets.validation) || self.datasets.validation.{own})"


_PAIR: Final = f"d.format in [{', '.join(repr(form) for form in PAIRS)}]"
RULES = (
    Rule(
        cel=_cel("Pretraining", _cel_formats("d.format == 'Text'")),
        message="objective.type Pretraining learns Text samples; no source of datasets may have another format",
        check=lambda s: kind_of(s) != "Pretraining" or _formats(s) <= {"Text"},
    ),
    Rule(
        cel=_cel("Pretraining", "!has(self.datasets.lossOn)"),
        message="objective.type Pretraining learns every token; leave datasets.lossOn out",
        check=lambda s: kind_of(s) != "Pretraining" or s.datasets.loss_on is None,
    ),
    Rule(
        cel=_cel("DPO", _cel_formats(_PAIR)),
        message="objective.type DPO learns from pairs; no source of datasets may have another format than "
        f"{' or '.join(PAIRS)}",
        check=lambda s: kind_of(s) != "DPO" or _formats(s) <= set(PAIRS),
    ),
    Rule(
        cel=_cel("DPO", "!has(self.datasets.lossOn)"),
        message="objective.type DPO compares whole answers; leave datasets.lossOn out",
        check=lambda s: kind_of(s) != "DPO" or s.datasets.loss_on is None,
    ),
    Rule(
        cel=f"(has(self.objective) && has(self.objective.type) && self.objective.type == 'DPO') || "
        f"({_cel_formats(f'!({_PAIR})')})",
        message=f"the formats {' and '.join(PAIRS)} hold two answers to one prompt; set objective.type to DPO",
        check=lambda s: kind_of(s) == "DPO" or not _formats(s) & set(PAIRS),
    ),
)
"""Of FineTuneJobSpec: what an objective asks of the data."""
