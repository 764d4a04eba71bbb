"""FineTunedModel: an immutable, digest-addressed record of finished weights."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Transition
from tuneward_api.conditions import Condition
from tuneward_api.resolved import ParentModel

DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
Digest = Annotated[str, Field(max_length=71, pattern=DIGEST_PATTERN)]


class ModelOrigin(Model):
    """The job that made it."""

    job: str = Field(max_length=253, description="Name of the FineTuneJob.")
    uid: str = Field(max_length=64, description="Its UID.")
    attempt: Int = Field(ge=1, description="Attempt that finished.")
    step: Int = Field(ge=0, description="Step of the weights.")


class ModelBase(Model):
    """What it was trained from; an adapter goes on top of it."""

    uri: str = Field(max_length=512, description="Address of the base model, pinned.")
    digest: Digest = Field(description="Digest of the base model's files.")
    architecture: str = Field(max_length=128, description="Model class.")
    chat_template_digest: str | None = Field(
        None, max_length=80, description="Digest of the chat template it was trained with."
    )


class Artifact(Model):
    """The files."""

    uri: Annotated[str, Field(pattern=r"^pvc://[^/]+/.+$")] = Field(
        max_length=512, description="pvc://CLAIM/PATH of its folder."
    )
    digest: Digest = Field(description="sha256 over the sorted (path, size, sha256) of its files.")
    size: Int = Field(ge=0, description="Bytes.")


class Adapter(Model):
    """Shape of the adapter."""

    type: Literal["LoRA", "DoRA"] | None = Field(
        None,
        description="Kind of adapter. Default: LoRA. The embedded engine loads both, vLLM no DoRA (see `tuneward merge`).",
    )
    rank: Int = Field(ge=1, le=4096, description="Rank.")
    alpha: float = Field(gt=0, description="Scale.")
    target_modules: list[Annotated[str, Field(max_length=128)]] = Field(max_length=64, description="Adapted layers.")


class ModelMetrics(Model):
    """What was measured. Losses are nats a token, of DPO nats a pair."""

    train_loss: float | None = Field(None, description="Training loss of the last step.")
    validation_loss_before: float | None = Field(None, description="Validation loss of what the job started from.")
    validation_loss_after: float | None = Field(None, description="Validation loss of this model.")
    validation_accuracy_before: float | None = Field(
        None, ge=0, le=1, description="Share of the held-out target tokens that the base model would write."
    )
    validation_accuracy_after: float | None = Field(None, ge=0, le=1, description="The same of this model.")
    task_score_before: float | None = Field(
        None, ge=0, le=1, description="Share of the base model's answers that evaluation.task.grader accepts."
    )
    task_score_after: float | None = Field(None, ge=0, le=1, description="The same of this model's answers.")
    steps: Int | None = Field(None, ge=0, description="Optimizer steps.")
    tokens: Int | None = Field(None, ge=0, description="Tokens trained on.")


def _fixed(field: str) -> Transition:
    return Transition(
        cel=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        message=f"{field} cannot be changed: a FineTunedModel is a record; train again for another one",
    )


class FineTunedModelSpec(Model):
    """Everything but archived and deletionPolicy is fixed."""

    served_name: str = Field(
        max_length=253, description="Name that clients ask for: ft:<base>:<suffix>:<yyyymmdd>:<digest8>."
    )
    source: ModelOrigin = Field(description="The job that made it.")
    base: ModelBase = Field(description="What it was trained from; an adapter goes on top of it.")
    parent: ParentModel | None = Field(None, description="The model that it was trained from, if it was one.")
    artifact: Artifact = Field(description="The files.")
    adapter: Adapter | None = Field(
        None,
        description="Shape of the adapter. Absent: method Full made a base model of its own, in the folder `model` of "
        "artifact.uri.",
    )
    metrics: ModelMetrics | None = Field(None, description="What was measured.")
    data_digest: str | None = Field(None, max_length=80, description="Digest of the tokenized samples.")
    archived: bool | None = Field(None, description="true takes it from every server; the files stay. Default: false.")

    TRANSITIONS: ClassVar[tuple[Transition, ...]] = tuple(
        _fixed(field) for field in ("servedName", "source", "base", "parent", "artifact", "adapter", "metrics", "dataDigest")
    )


class ReplicaProof(Model):
    """What one replica of the server found."""

    pod: str = Field(max_length=253, description="Pod.")
    ready: bool = Field(description="Whether it answers with this model.")
    reason: str = Field(max_length=64, description="One CamelCase word.")
    message: str | None = Field(None, max_length=512, description="What was found.")


class FineTunedModelStatus(Model):
    """Written by the operator alone."""

    conditions: list[Condition] | None = Field(
        None,
        max_length=8,
        description="Ready: verified and, where a server is asked for, answering on every ready replica.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: Int | None = Field(None, ge=0, description="Generation that this status is about.")
    server: str | None = Field(None, max_length=253, description="ModelServer that is asked to serve it.")
    replicas: list[ReplicaProof] | None = Field(None, max_length=32, description="What each replica found.")
    message: str | None = Field(None, max_length=1024, description="What happened and, if anything, what to do.")


class FineTunedModel(Model):
    """A finished model version: what was trained, from what, and where its files are."""

    api_version: Literal["tuneward.dev/v1alpha1"]
    kind: Literal["FineTunedModel"]
    metadata: dict[str, Any]
    spec: FineTunedModelSpec = Field(description="The record.")
    status: FineTunedModelStatus | None = Field(None, description="Whether it is served.")
