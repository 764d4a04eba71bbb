"""How a result is measured on held-out samples, and what it must reach. Beside finetunejob.py, which holds the rest."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Rule, Ruled
from tuneward_api.objective import kind_of

Grader = Literal["Exact", "Contains", "JSONSchema", "ToolCall"]

TASK_SAMPLES = 32
TASK_TOKENS = 256


SCHEMA_RULE = Rule(
    cel="self.startsWith('{') && self.endsWith('}')",
    message='must be a JSON Schema as one JSON object, such as {"type": "object"}',
    check=lambda text: text.startswith("{") and text.endswith("}"),
)


class Task(Model):
    """What the model is asked to write: answers to held-out prompts, greedily, before and after training."""

    grader: Grader | None = Field(
        None,
        description="When an answer counts. Exact: it is the held-out one (OpenAI's string_check eq). Contains: the "
        "held-out one occurs in it, whatever the case (ilike). JSONSchema: it is JSON of jsonSchema. ToolCall: it calls the "
        "same tools with the same arguments. Default: answers are kept in generations.jsonl and not graded.",
    )
    json_schema: Annotated[str, Field(max_length=16384), Ruled(SCHEMA_RULE)] | None = Field(
        None, description="JSON Schema of an answer, as text. For the grader JSONSchema."
    )
    samples: Int | None = Field(
        None, ge=1, le=10_000, description=f"Held-out samples that are asked, spread over all. Default: {TASK_SAMPLES}."
    )
    max_tokens: Int | None = Field(
        None, ge=1, le=32_768, description=f"Longest answer in tokens; a longer one is cut. Default: {TASK_TOKENS}."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="has(self.jsonSchema) == (has(self.grader) && self.grader == 'JSONSchema')",
            message="jsonSchema and grader JSONSchema belong together; set both or neither",
            check=lambda t: (t.json_schema is not None) == (t.grader == "JSONSchema"),
        ),
    )


class Gate(Model):
    """What the result must reach to become a model. Needs validation samples."""

    max_loss: float | None = Field(
        None, gt=0, le=100, description="Highest validation loss (nats a token, for DPO a pair) that passes."
    )
    min_improvement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share by which the validation loss must fall below that of the model the job starts from.",
    )
    min_score: float | None = Field(
        None, gt=0, le=1, description="Least share of answers that evaluation.task.grader must accept."
    )


class Evaluation(Model):
    """How the result is measured on validation samples."""

    every_steps: Int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Steps between two evaluations. Default: before and after training only.",
    )
    patience: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Evaluations without a lower validation loss after which the training ends; the checkpoint with the "
        "lowest becomes the model. Default: trained to the end, and the last step becomes the model.",
    )
    task: Task | None = Field(None, description="What the model is asked to write. Default: nothing.")
    gate: Gate | None = Field(None, description="What the result must reach. Default: nothing.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.patience) || has(self.everySteps)",
            message="patience needs everySteps, the steps between two evaluations",
            check=lambda e: e.patience is None or e.every_steps is not None,
        ),
        Rule(
            cel="!has(self.gate) || !has(self.gate.minScore) || (has(self.task) && has(self.task.grader))",
            message="gate.minScore needs task.grader, which says when an answer counts",
            check=lambda e: e.gate is None or e.gate.min_score is None or (e.task is not None and e.task.grader is not None),
        ),
    )


def _held_out(spec: Any) -> bool:
    return spec.datasets.validation is not None or spec.datasets.validation_fraction is not None


def _asks_held_out(evaluation: Evaluation) -> bool:
    return any(part is not None for part in (evaluation.patience, evaluation.task, evaluation.gate))


RULES = (
    Rule(
        cel="!has(self.evaluation) || !(has(self.evaluation.patience) || has(self.evaluation.task) || "
        "has(self.evaluation.gate)) || has(self.datasets.validation) || has(self.datasets.validationFraction)",
        message="evaluation's patience, task and gate need datasets.validation or datasets.validationFraction",
        check=lambda s: s.evaluation is None or not _asks_held_out(s.evaluation) or _held_out(s),
    ),
    Rule(
        cel="!has(self.evaluation) || !has(self.evaluation.task) || !has(self.objective) || !has(self.objective.type)"
        " || self.objective.type == 'SFT'",
        message="evaluation.task asks for answers, which only objective.type SFT has; leave it out",
        check=lambda s: s.evaluation is None or s.evaluation.task is None or kind_of(s) == "SFT",
    ),
)
"""Of FineTuneJobSpec: what an evaluation asks of the data and the objective."""
