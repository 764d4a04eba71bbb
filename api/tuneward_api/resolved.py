"""What prepare chose and pinned: part of the plan, and `status.resolved`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuneward_api.base import Int, Model
from tuneward_api.objective import SUPERVISED, ResolvedObjective


class ResolvedBase(Model):
    """The base model that is trained from, pinned."""

    uri: str = Field(max_length=512, description="Address with the revision that was found.")
    key: str = Field(max_length=128, description="Its folder's key in the store.")
    digest: str = Field(max_length=80, description="sha256 over the sorted (path, size, sha256) of its files.")
    architecture: str = Field(max_length=128, description="Model class.")
    parameters: Int = Field(description="Number of parameters.", ge=0)


class ParentModel(Model):
    """The FineTunedModel that training went on from."""

    name: str = Field(max_length=253, description="Its name.")
    digest: str = Field(max_length=80, description="Digest of its files.")


class ResolvedData(Model):
    """What prepare made of the data."""

    digest: str = Field(max_length=80, description="Digest of the tokenized samples.")
    samples: Int = Field(description="Training samples.", ge=0)
    tokens: Int = Field(description="Training tokens of one epoch.", ge=0)
    target_tokens: Int = Field(description="Those that are learnt.", ge=0)
    validation_samples: Int = Field(0, description="Held-out samples.", ge=0)
    split: Int | None = Field(None, description="Samples too long for a row that were split.", ge=0)
    truncated: Int | None = Field(None, description="Samples too long for a row that were cut at their end.", ge=0)
    skipped: Int | None = Field(None, description="Samples too long for a row that were left out.", ge=0)
    invalid: Int | None = Field(None, description="Samples that were left out as invalid.", ge=0)


class ResolvedPacking(Model):
    """Whether several samples share a row, as the check against the plain model decided."""

    mode: Literal["Packed", "OneDocument"] = Field(description="Packed, or OneDocument a forward pass.")
    reason: str = Field(max_length=512, description="Why.")
    patches: list[Annotated[str, Field(max_length=64)]] = Field(
        default_factory=list, max_length=16, description="Patches that agreed with the plain model."
    )


MethodType = Literal["LoRA", "QLoRA", "DoRA", "Full"]


class ResolvedMethod(Model):
    """The method with every default chosen."""

    type: MethodType = Field(
        description="Kind of adapter (QLoRA: a LoRA on packed weights), or Full: all weights, and no adapter."
    )
    rank: Int | None = Field(None, description="Rank.")
    alpha: float | None = Field(None, description="Scale.")
    dropout: float | None = Field(None, description="Dropout.")
    rs_lora: bool | None = Field(None, alias="rsLoRA", description="Rank-stabilised scale.")
    target_modules: list[Annotated[str, Field(max_length=128)]] | None = Field(
        None, max_length=64, description="Adapted layers."
    )
    trainable_parameters: Int = Field(description="Number of parameters that are trained.", ge=0)


BaseWeights = Literal["Replicated", "Sharded", "Auto"]
"""Auto: on GPUs the ranks choose when they start, by the smallest one's memory, which prepare cannot know."""


class ResolvedHyperparameters(Model):
    """The numbers with every default chosen."""

    epochs: float = Field(description="Passes over the data.")
    steps: Int = Field(description="Optimizer steps.")
    learning_rate: float = Field(description="Peak learning rate.")
    scheduler: Literal["Cosine", "Linear", "Constant"] = Field(description="Schedule after warm-up.")
    warmup_fraction: float = Field(description="Share of the steps that warm up.")
    weight_decay: float = Field(description="Weight decay.")
    max_grad_norm: float = Field(description="Gradient clip.")
    sequence_length: Int = Field(description="Longest sample and row, in tokens.")
    batch_tokens: Int = Field(description="Tokens an optimizer step.")
    seed: Int = Field(description="Seed.")


class ResolvedEstimate(Model):
    """What the training was expected to cost, before it ran. Bytes are those of one rank at its peak; on a GPU with as many
    rows at once as are of any use, of which it takes fewer where its memory is smaller."""

    memory_bytes: Int = Field(description="All that a rank needs, with what allocators and drivers keep.", ge=0)
    weight_bytes: Int = Field(description="Of it, the base model's weights; the rank's share where they are sharded.", ge=0)
    state_bytes: Int = Field(description="Trained parameters, gradients and the optimizer's moments.", ge=0)
    activation_bytes: Int = Field(description="What the backward pass needs of the forward pass.", ge=0)
    buffer_bytes: Int = Field(description="The largest of what is needed for a moment, such as logits.", ge=0)
    flops: float = Field(description="Floating-point operations of the whole training.", ge=0)


class Resolved(Model):
    """Every default chosen and every moving part pinned; copied once from the plan."""

    base: ResolvedBase = Field(description="The base model, pinned.")
    parent: ParentModel | None = Field(None, description="The model that training goes on from.")
    data: ResolvedData = Field(description="The data.")
    objective: ResolvedObjective = Field(SUPERVISED, description="What is learnt of the samples.")
    method: ResolvedMethod = Field(description="The method.")
    hyperparameters: ResolvedHyperparameters = Field(description="The numbers.")
    bins_per_micro_batch: Int = Field(description="Packed rows a forward pass.")
    packing: ResolvedPacking = Field(description="Whether samples share a row.")
    base_weights: BaseWeights | None = Field(
        None,
        description="Whether each rank has the frozen base model whole (Replicated) or its share of it (Sharded); Auto: "
        "ranks choose by their GPUs' memory and log it. Absent with Full.",
    )
    estimate: ResolvedEstimate | None = Field(None, description="What it was expected to cost.")
    images: dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=512)]] = Field(
        max_length=8, description="Images that the job runs."
    )
