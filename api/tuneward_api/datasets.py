"""What a job learns from: sources of samples, their formats, and what may become of a sample."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Rule, Ruled
from tuneward_api.uris import DataUri

DataFormat = Literal["Messages", "PromptCompletion", "Conversations", "Instruction", "Text", "Preference", "PreferredOutput"]
DataField = Literal[
    "messages",
    "tools",
    "prompt",
    "completion",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "text",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
]
FIELDS_RULE = Rule(
    cel="self.all(k, self.exists_one(j, self[j] == self[k]))",
    message="two columns must not become the same field",
    check=lambda value: len(set(value.values())) == len(value),
)
FieldMap = Annotated[
    dict[Annotated[str, Field(max_length=128)], DataField], Field(min_length=1, max_length=10), Ruled(FIELDS_RULE)
]


class Dataset(Model):
    """One source of samples."""

    uri: DataUri = Field(
        description="Where the file is: configmap://NAME/KEY or pvc://CLAIM/PATH; .jsonl, .jsonl.gz, .jsonl.zst or "
        ".parquet. A folder stands for all such files in it, in the order of their names."
    )
    format: DataFormat | None = Field(
        None,
        description="Messages (messages), PromptCompletion (prompt, completion), Conversations (ShareGPT's "
        "conversations of from and value), Instruction (Alpaca's instruction, input, output), Text (text), or for "
        "objective.type DPO Preference (prompt, chosen, rejected) or PreferredOutput (OpenAI's input, preferred_output, "
        "non_preferred_output). Default: told from the first sample.",
    )
    fields: FieldMap | None = Field(
        None,
        description="Names of columns -> the fields of the format that they are, such as {question: prompt, "
        "answer: completion}. Default: the columns have the fields' names.",
    )
    weight: Int | None = Field(None, ge=1, le=1000, description="Copies of this source in an epoch. Default: 1.")


class Datasets(Model):
    """What is learnt from, and what the result is measured on."""

    training: list[Dataset] = Field(min_length=1, max_length=64, description="Sources of training samples.")
    validation: list[Dataset] | None = Field(
        None, min_length=1, max_length=64, description="Sources of held-out samples. Default: none."
    )
    validation_fraction: float | None = Field(
        None, gt=0, le=0.5, description="Share of the training samples to hold out instead. Default: 0."
    )
    on_too_long: Literal["Error", "Split", "Truncate", "Skip"] | None = Field(
        None,
        description="What happens to a sample longer than sequenceLength: Error (default) refuses the data, "
        "Split (default of Pretraining) makes several of a Text sample, Truncate cuts its end, Skip leaves it out. "
        "Of a pair, each answer with its prompt counts.",
    )
    loss_on: Literal["Assistant", "LastAssistant", "All"] | None = Field(
        None,
        description="Which tokens are learnt: Assistant (default), every assistant turn whose weight is not 0; "
        "LastAssistant, the last one; All, every token. Text samples are always learnt whole.",
    )
    invalid_sample_skip_percentage: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Share of all samples, in percent, that may be invalid: so many are left out and named in "
        "prepare/errors.txt of the run directory; more refuse the data. Default: 0.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!(has(self.validation) && has(self.validationFraction))",
            message="set validation or validationFraction, not both",
            check=lambda s: s.validation is None or s.validation_fraction is None,
        ),
    )
