"""ModelServer: replicas that serve one base model and any number of adapters."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Rule, Transition
from tuneward_api.conditions import Condition
from tuneward_api.finetunejob import SecretRef, Store
from tuneward_api.names import MAX_JOB_NAME, fits_name
from tuneward_api.uris import BaseUri
from tuneward_api.workers import NodeSelector, Resources, Toleration


class BaseSource(Model):
    """The base model. Adapters are asked for by a label on their FineTunedModel."""

    uri: BaseUri = Field(
        description="Where the base model is: hf://ORG/NAME[@REVISION] or pvc://CLAIM/PATH "
        "(a folder with config.json and safetensors)."
    )
    secret_ref: SecretRef | None = Field(None, description="Secret with the key `token` for a gated hub model.")


class ModelServerSpec(Model):
    """The base model, the engine and its limits."""

    model: BaseSource = Field(description="The base model.")
    store: Store | None = Field(None, description="The volume that holds models and adapters.")
    engine: Literal["Embedded"] | None = Field(
        None, description="Embedded (default): transformers and PEFT, for CPUs and demos."
    )
    replicas: Int | None = Field(None, ge=0, le=64, description="Pods. Default: 1.")
    max_adapters: Int | None = Field(None, ge=1, le=1024, description="Adapters a replica holds. Default: 16.")
    max_rank: Int | None = Field(None, ge=1, le=512, description="Largest rank it accepts. Default: 64.")
    api_key_secret_ref: SecretRef | None = Field(
        None,
        description="Secret with the key `token` that clients must send as a bearer token. Default: no key.",
    )
    resources: Resources | None = Field(None, description="CPU and memory of the engine. Default: 1 CPU, 2Gi requested.")
    node_selector: NodeSelector | None = Field(None, description="Labels that its node must have.")
    tolerations: list[Toleration] | None = Field(None, max_length=32, description="Taints that it bears.")

    TRANSITIONS: ClassVar[tuple[Transition, ...]] = tuple(
        Transition(
            cel=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
            message=f"{field} cannot be changed after creation; make a new ModelServer under another name",
        )
        for field in ("model", "store")
    )


class ModelServerStatus(Model):
    """Written by the operator alone."""

    conditions: list[Condition] | None = Field(
        None,
        max_length=8,
        description="Ready: at least one replica answers.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: Int | None = Field(None, ge=0, description="Generation that this status is about.")
    base_digest: str | None = Field(None, max_length=80, description="Digest of the base model's files.")
    base_uri: str | None = Field(None, max_length=512, description="Address of the base model, pinned.")
    base_claim: str | None = Field(None, max_length=253, description="Claim that holds the base model.")
    base_path: str | None = Field(None, max_length=512, description="Its folder in the claim.")
    address: str | None = Field(None, max_length=512, description="Base URL inside the cluster, OpenAI-compatible.")
    replicas: Int | None = Field(None, ge=0, description="Pods.")
    ready_replicas: Int | None = Field(None, ge=0, description="Pods that answer.")
    adapters: Int | None = Field(None, ge=0, description="FineTunedModels it is asked to serve.")
    ready_adapters: Int | None = Field(None, ge=0, description="Those that every ready replica has proved.")
    message: str | None = Field(None, max_length=1024, description="What happened and, if anything, what to do.")


class ModelServer(Model):
    """Serves one base model and any number of adapters over an OpenAI-compatible API."""

    api_version: Literal["tuneward.dev/v1alpha1"]
    kind: Literal["ModelServer"]
    metadata: dict[str, Any]
    spec: ModelServerSpec = Field(description="What is asked for.")
    status: ModelServerStatus | None = Field(None, description="What has become of it.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"size(self.metadata.name) <= {MAX_JOB_NAME} && self.metadata.name.matches(r'^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            message=f"metadata.name must have at most {MAX_JOB_NAME} characters of a-z, 0-9 and -, "
            "begin with a letter and end with a letter or digit (pods and a Service are named after it)",
            check=lambda s: fits_name(str(s.metadata.get("name", "")), MAX_JOB_NAME),
        ),
    )
