"""What the parts hand each other as JSON: request, plan, reports, progress, result, wanted adapters.

request  operator -> prepare, fetch      ConfigMap <job>-request, /etc/tuneward/request.json
report   prepare -> operator             termination message, and prepare/report.json in the run directory
plan     operator -> train, finish       ConfigMap <job>-plan, /etc/tuneward/plan.json
start    leader -> everybody             attempts/<n>/start.json, created exclusively: the fence
progress leader -> operator, command     GET :8787/progress
result   leader -> operator, finish      attempts/<n>/result.json, and its short form as termination message
finished finish -> operator              termination message, and finish/report.json in the run directory
wanted   operator -> agent               ConfigMap <server>-adapters, /etc/tuneward/adapters/adapters.json
proofs   agent -> operator               GET :8001/adapters

All are tolerant of unknown fields: another version of us may have written them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

from pydantic import Field

from tuneward_api.base import Int, Record
from tuneward_api.conditions import Reason
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.names import MAX_MESSAGE, TERMINATION_MESSAGE_LIMIT
from tuneward_api.objective import SUPERVISED, ResolvedObjective
from tuneward_api.resolved import (
    BaseWeights,
    ResolvedData,
    ResolvedEstimate,
    ResolvedHyperparameters,
    ResolvedMethod,
    ResolvedPacking,
)
from tuneward_api.trackers import TrackerState


class JobRef(Record):
    """Whose files these are. `uid` is empty on a workstation."""

    namespace: str
    name: str
    uid: str


class Images(Record):
    """Image names, pinned when the job is accepted, so that an upgraded operator changes nothing of it."""

    trainer: str


class Parent(Record):
    """The FineTunedModel that a job goes on from, as it was when the job was accepted: what becomes of it later changes
    nothing of the job."""

    name: str
    base_uri: str
    base_digest: str
    artifact_uri: str = Field(description="pvc://CLAIM/PATH of its folder.")
    artifact_digest: str
    whole: Literal[True] | None = Field(
        None, description="It was trained whole: its own weights are what is gone on from, not an adapter."
    )

    @property
    def starts_from(self) -> str:
        """Address of the base model of a job that goes on from it."""
        return f"{self.artifact_uri}/model" if self.whole else self.base_uri


class Request(Record):
    """What prepare reads."""

    job: JobRef
    spec: FineTuneJobSpec
    images: Images
    store_claim: str
    run_directory: str = Field(description="Below the store's root: jobs/<name>-<uid8>.")
    parent: Parent | None = Field(None, description="Where spec.model.uri is model://NAME.")

    @property
    def base_uri(self) -> str:
        """Address of the base model."""
        return self.spec.model.uri if self.parent is None else self.parent.starts_from

    def uris(self) -> list[str]:
        """All that prepare reads from: the base model, the parent's files, the data."""
        datasets = [*self.spec.datasets.training, *(self.spec.datasets.validation or ())]
        parent = [] if self.parent is None else [self.parent.artifact_uri]
        return [self.base_uri, *parent, *(dataset.uri for dataset in datasets)]


class FetchRequest(Record):
    """What `fetch` reads: a ModelServer's base model."""

    uri: str
    store_claim: str


class Base(Record):
    """The base model, pinned, and where it lies: `sub_path` below the root of `claim`."""

    uri: str
    key: str
    digest: str
    architecture: str
    parameters: Int
    claim: str
    sub_path: str
    chat_template_digest: str | None = None


class Data(Record):
    """The tokenized samples: the folder `sub_path` below the store's root holds training and validation parts."""

    sub_path: str
    summary: ResolvedData


class Prepared(Record):
    """Everything that prepare found and chose; with the request it is the plan."""

    base: Base
    data: Data
    objective: ResolvedObjective = SUPERVISED
    method: ResolvedMethod
    hyperparameters: ResolvedHyperparameters
    packing: ResolvedPacking
    bins_per_micro_batch: Int = 1
    base_weights: BaseWeights | None = None
    estimate: ResolvedEstimate | None = None
    model_type: str = Field("", description="config.json's model_type.")


class Report(Record):
    """How a prepare, fetch or finish process ended. `outcome` Failed carries reason and message; exit codes agree."""

    outcome: Literal["Done", "Failed"]
    reason: Reason
    message: str = Field(max_length=MAX_MESSAGE)


class PrepareReport(Report):
    prepared: Prepared | None = None


class FetchReport(Report):
    base: Base | None = None


class Plan(Record):
    """What every attempt and finish read."""

    request: Request
    prepared: Prepared

    def digest(self) -> str:
        """Identity of the plan: a result that carries another digest is another job's."""
        return "sha256:" + hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


class Start(Record):
    """attempts/<n>/start.json."""

    attempt: Int
    pod_uid: str = Field(alias="podUID")
    pod_name: str
    node: str
    plan_digest: str
    started_at: str
    workers: Int
    ranks: Int
    from_step: Int
    resume: str = Field(description="exact, or equivalent and why.")


class SavedCheckpoint(Record):
    step: Int
    digest: str
    saved_at: str
    directory: str = Field(description="Below the run directory.")


class Progress(Record):
    """GET /progress. Numbers that are not finite are left out."""

    attempt: Int = 0
    pod_uid: str = Field("", alias="podUID")
    phase: Literal["Starting", "Loading", "Training", "Evaluating", "Saving", "Done"] = "Starting"
    step: Int = 0
    steps: Int = 0
    epoch: float | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: Int | None = None
    memory_bytes: Int | None = None
    mfu: float | None = None
    checkpoint: SavedCheckpoint | None = None
    from_step: Int = 0
    resume: str = "exact"
    rank_steps: list[Int] = Field(default_factory=list)
    node: str = ""
    trackers: list[TrackerState] = Field(default_factory=list)
    observed_at: str = ""


class Metrics(Record):
    """Losses are nats a token, of DPO nats a pair."""

    train_loss: float | None = None
    validation_loss_before: float | None = None
    validation_loss_after: float | None = None
    validation_accuracy_before: float | None = None
    validation_accuracy_after: float | None = None
    task_score_before: float | None = None
    task_score_after: float | None = None
    steps: Int = 0
    tokens: Int = 0
    seconds: float = 0.0


class Result(Record):
    """attempts/<n>/result.json; also the termination message of every worker."""

    attempt: Int
    pod_uid: str = Field(alias="podUID")
    plan_digest: str
    outcome: Literal["Succeeded", "Failed", "Stopped"]
    exit_code: Int
    reason: Reason
    message: str = Field(max_length=MAX_MESSAGE)
    step: Int
    steps: Int
    finished_at: str
    checkpoint: SavedCheckpoint | None = None
    adapter_directory: str | None = Field(
        None, description="Below the run directory: the adapter, or the whole model, with its proof."
    )
    adapter_digest: str | None = None
    metrics: Metrics = Field(default_factory=lambda: Metrics())
    from_step: Int = 0
    resume: str = "exact"
    node: str = ""
    trackers: list[TrackerState] = Field(default_factory=list, description="Known when the last figures were sent.")

    @property
    def terminal(self) -> bool:
        """Whether a later attempt of the same plan reports this again instead of training."""
        return self.exit_code in (0, 65, 78)


PROOF_TOLERANCE: Final = {"float32": 5e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability by the type that is computed in: engines batch, pad and merge otherwise than the
trainer does; a wrong adapter is off by more than this."""


def proof_tolerance(dtype: str) -> float:
    return PROOF_TOLERANCE.get(dtype, PROOF_TOLERANCE["bfloat16"])


class ProofText(Record):
    """One text of proof.json: token ids, and the log-probability that base and tuned model give each next token.

    `base` and `tuned` have one entry fewer than `ids`: entry i is log p(ids[i + 1] | ids[: i + 1]).
    """

    ids: list[Int]
    base: list[float]
    tuned: list[float]


class Proof(Record):
    """proof.json beside an adapter: what a right engine must compute."""

    texts: list[ProofText]
    dtype: str
    tolerance: float = Field(description="Largest absolute difference of a log-probability on the trainer's dtype.")


class FinishedAdapter(Record):
    """A finished adapter, or whole model, as FineTunedModel's spec will have it."""

    sub_path: str = Field(description="Below the store's root: adapters/sha256-<hex>, or tuned/sha256-<hex>.")
    digest: str
    size: Int
    type: Literal["LoRA", "DoRA", "Full"] = "LoRA"
    rank: Int | None = None
    alpha: float | None = None
    target_modules: list[str] | None = None
    served_name: str
    attempt: Int
    step: Int
    metrics: Metrics

    @property
    def whole(self) -> bool:
        """A base model of its own."""
        return self.type == "Full"

    @property
    def folder(self) -> str:
        """Below the store's root: what an engine loads."""
        return f"{self.sub_path}/{'model' if self.whole else 'adapter'}"


class FinishReport(Report):
    """`outcome` Failed with reason GateRefused: trained, but not good enough; the artefact stays in the run directory."""

    adapter: FinishedAdapter | None = None
    metrics: Metrics | None = None


class WantedAdapter(Record):
    """One adapter that a server shall serve."""

    name: str = Field(description="Name that clients ask for.")
    model: str = Field(description="Name of the FineTunedModel.")
    path: str = Field(description="Below the adapters folder: sha256-<hex>.")
    digest: str
    rank: Int


class WantedAdapters(Record):
    adapters: list[WantedAdapter] = Field(default_factory=list)

    def digest(self) -> str:
        """What an agent repeats beside its proofs, so that the operator knows which list they are about."""
        return "sha256:" + hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


class AdapterProof(Record):
    """What the agent found about one wanted adapter."""

    name: str
    digest: str
    ready: bool
    reason: Reason
    message: str = ""


class AgentReport(Record):
    """GET :8001/adapters."""

    base_ready: bool
    wanted_digest: str = Field("", description="Digest of the wanted list that this answers.")
    adapters: list[AdapterProof] = Field(default_factory=list)


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def termination_message(report: Report | Result) -> str:
    """The report as one JSON of at most 4,000 bytes; its message is cut first."""
    text = canonical_json(report.to_json())
    excess = len(text.encode()) - TERMINATION_MESSAGE_LIMIT
    if excess <= 0:
        return text
    kept = max(0, len(report.message) - excess - 8)
    return canonical_json(report.model_copy(update={"message": report.message[:kept] + "…"}).to_json())
