"""Where a job's pods run, and with what: the gang of workers, and what other resources share with it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Quantity, Rule, Ruled

GPU_KEY_RULE = Rule(
    cel="self.all(k, !k.contains('/') && !k.contains('gpu'))",
    message="only cpu, memory and ephemeral-storage belong here; ask for GPUs with workers.gpusPerWorker",
    check=lambda value: all("/" not in key and "gpu" not in key for key in value),
)
ResourceList = Annotated[dict[Annotated[str, Field(max_length=63)], Quantity], Field(max_length=8), Ruled(GPU_KEY_RULE)]


class Resources(Model):
    """Requests and limits of a container."""

    requests: ResourceList | None = Field(None, description="What the scheduler sets aside.")
    limits: ResourceList | None = Field(None, description="What the container may use at most.")


class Toleration(Model):
    """A toleration as in a pod."""

    key: str | None = Field(None, max_length=253, description="Taint key; empty with Exists matches all.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Exists or Equal (default).")
    value: str | None = Field(None, max_length=63, description="Taint value for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Taint effect; absent matches all."
    )
    toleration_seconds: Int | None = Field(None, ge=0, le=31_536_000, description="How long NoExecute is tolerated.")


LabelValue = Annotated[str, Field(max_length=63)]
NodeSelector = Annotated[dict[Annotated[str, Field(max_length=253)], LabelValue], Field(max_length=16)]


class Workers(Model):
    """The gang: pods that train together."""

    replicas: Int | None = Field(None, ge=1, le=256, description="Pods that train together. Default: 1.")
    gpus_per_worker: Int | None = Field(None, ge=0, le=64, description="GPUs of each pod; 0 trains on CPUs. Default: 1.")
    resources: Resources | None = Field(None, description="CPU and memory of each pod. Default: 2 CPUs, 4Gi requested.")
    node_selector: NodeSelector | None = Field(None, description="Labels that a worker's node must have.")
    tolerations: list[Toleration] | None = Field(None, max_length=32, description="Taints that workers bear.")
    base_weights: Literal["Replicated", "Sharded"] | None = Field(
        None,
        description="Where the frozen base model is: Replicated, whole on each rank, or Sharded, split over all ranks, "
        "which gather it layer by layer. The result is the same. Default: Sharded where that makes it fit a rank's memory, "
        "else Replicated.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.baseWeights) || self.baseWeights != 'Sharded' || (has(self.replicas) && self.replicas > 1) || "
            "(has(self.gpusPerWorker) && self.gpusPerWorker > 1)",
            message="baseWeights Sharded splits the base model over ranks; set replicas or gpusPerWorker to 2 or more",
            check=lambda w: w.base_weights != "Sharded" or (w.replicas or 1) > 1 or (w.gpus_per_worker or 1) > 1,
        ),
    )
