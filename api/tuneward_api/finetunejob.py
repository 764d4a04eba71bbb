"""FineTuneJob: what a person asks for, and what status answers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuneward_api.base import Int, Model, Rule, Ruled, Transition
from tuneward_api.conditions import Condition, Phase
from tuneward_api.datasets import Datasets
from tuneward_api.evaluation import RULES as EVALUATION_RULES
from tuneward_api.evaluation import Evaluation
from tuneward_api.names import MAX_JOB_NAME, fits_name
from tuneward_api.objective import RULES as OBJECTIVE_RULES
from tuneward_api.objective import Objective
from tuneward_api.resolved import Resolved
from tuneward_api.trackers import Trackers, TrackerStatus
from tuneward_api.uris import ModelUri
from tuneward_api.workers import Workers

Name = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
SubdomainName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class SecretRef(Model):
    """A Secret of the job's namespace."""

    name: SubdomainName = Field(description="Name of the Secret. It reaches the prepare pod only.")


class ModelSource(Model):
    """What training starts from."""

    uri: ModelUri = Field(
        description="Where the base model is: hf://ORG/NAME[@REVISION] or pvc://CLAIM/PATH "
        "(a folder with config.json and safetensors). Or model://NAME: a FineTunedModel of this namespace, to go on from: "
        "one that was trained whole is the base model; an adapter is trained further on its base model, and what of "
        "spec.method has its shape is then the adapter's. With method Full it is added to the base model's weights first."
    )
    secret_ref: SecretRef | None = Field(None, description="Secret with the key `token` for a gated hub model.")


TARGET_RULE = Rule(
    cel="self.all(m, m.matches(r'^[A-Za-z0-9_.]+$'))",
    message="each entry must be the name of a Linear layer such as q_proj",
    check=lambda value: all(m and all(c.isalnum() or c in "_." for c in m) for m in value),
)


def _trains_all(spec: Any) -> bool:
    return spec.method is not None and spec.method.type == "Full"


_FULL_CEL = "!has(self.method) || !has(self.method.type) || self.method.type != 'Full'"
FULL_RULES = (
    Rule(
        cel=f"{_FULL_CEL} || !has(self.serve)",
        message="method.type Full makes a base model of its own, which no ModelServer of another one can load; leave serve "
        "out, and make a ModelServer of it when the job is done",
        check=lambda s: not _trains_all(s) or s.serve is None,
    ),
    Rule(
        cel=f"{_FULL_CEL} || !has(self.workers) || !has(self.workers.baseWeights)",
        message="method.type Full leaves no weight frozen, and always shards them; leave workers.baseWeights out",
        check=lambda s: not _trains_all(s) or s.workers is None or s.workers.base_weights is None,
    ),
)
"""Of FineTuneJobSpec."""


class Method(Model):
    """How the model is adapted."""

    type: Literal["LoRA", "QLoRA", "DoRA", "Full"] | None = Field(
        None,
        description="LoRA (default) learns a low-rank update of each layer; QLoRA the same on frozen weights of 4 bits "
        "(NF4), which need a quarter of the memory and more time; DoRA learns the length of each output's weights "
        "too, and takes longer (the embedded engine serves it, vLLM only what `tuneward merge` makes of it). Full trains "
        "all weights of the text part but routers, split over all ranks, and makes a base model of its own.",
    )
    rank: Int | None = Field(None, ge=1, le=512, description="Rank of the update. Default: 16.")
    alpha: float | None = Field(
        None, gt=0, le=4096, description="Scale of the update; it is multiplied by alpha/rank. Default: 32."
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout before the adapter. Default: 0, which is also the fastest."
    )
    rs_lora: bool | None = Field(
        None,
        alias="rsLoRA",
        description="Multiply by alpha/sqrt(rank) instead (rank-stabilised). Default: false.",
    )
    target_modules: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Ruled(TARGET_RULE)] | None = Field(
        None,
        min_length=1,
        max_length=32,
        description="Names of Linear layers to adapt. Default: every Linear of the decoder; never router, head or vision.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.type) || self.type != 'Full' || (!has(self.rank) && !has(self.alpha) && !has(self.dropout) && "
            "!has(self.rsLoRA) && !has(self.targetModules))",
            message="rank, alpha, dropout, rsLoRA and targetModules shape an adapter, which Full has not; leave them out",
            check=lambda m: (
                m.type != "Full" or all(value is None for value in (m.rank, m.alpha, m.dropout, m.rs_lora, m.target_modules))
            ),
        ),
    )


class Hyperparameters(Model):
    """Numbers of the optimisation. Each default is chosen by prepare and shown in status.resolved."""

    epochs: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Passes over the data. Default: 3 below 20,000 samples, 1 above 100,000, else 2; "
        "1 for Pretraining and DPO.",
    )
    steps: Int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate of AdamW. Default: 4e-4 up to 4B parameters, 2e-4 above, 1e-4 from 65B; "
        "5e-6 for DPO; 2e-5 for method Full, 5e-7 for DPO of it.",
    )
    scheduler: Literal["Cosine", "Linear", "Constant"] | None = Field(
        None, description="After warm-up: Cosine (default) or Linear down to a tenth, or Constant."
    )
    warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="Share of the steps that warm up. Default: 0.05; 0.1 for DPO."
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="AdamW's weight decay. Default: 0; 0.1 for Pretraining and for "
        "method Full but of DPO. With Full norms and biases have none.",
    )
    max_grad_norm: float | None = Field(None, gt=0, le=1000, description="Gradients are clipped to this norm. Default: 1.")
    sequence_length: Int | None = Field(
        None,
        ge=16,
        le=1_048_576,
        description="Longest sample in tokens, and length of a packed row. "
        "Default: the longest sample, at most 4,096 and what the model allows. "
        "For DPO the longest answer with its prompt; a row has room for two.",
    )
    batch_tokens: Int | None = Field(
        None,
        ge=16,
        le=16_777_216,
        description="Tokens an optimizer step, over all workers: the same result on 1 or 8. "
        "Default: the power of two nearest (epochs x tokens)/200, between 4,096 and 131,072 (1,048,576 for Pretraining), "
        "for DPO the one nearest 32 pairs; but no more than a fifth of all tokens.",
    )
    seed: Int | None = Field(
        None, ge=0, le=4_294_967_295, description="Seed of order, initialisation and dropout. Default: 0."
    )
    deterministic: bool | None = Field(
        None,
        description="true: GPUs give the same bytes each time too, as CPUs always do, with slower kernels. Default: false.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!(has(self.epochs) && has(self.steps))",
            message="set epochs or steps, not both",
            check=lambda s: s.epochs is None or s.steps is None,
        ),
    )


class Checkpoint(Model):
    """How often the state is saved; a killed job goes on from the newest complete one."""

    every_steps: Int | None = Field(None, ge=1, le=1_000_000, description="Steps between two checkpoints.")
    every_seconds: Int | None = Field(
        None,
        ge=1,
        le=86_400,
        description="Seconds between two checkpoints. Default: 300, when everySteps is absent.",
    )
    keep: Int | None = Field(None, ge=1, le=100, description="Checkpoints that stay. Default: 2.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!(has(self.everySteps) && has(self.everySeconds))",
            message="set everySteps or everySeconds, not both",
            check=lambda s: s.every_steps is None or s.every_seconds is None,
        ),
    )


class Store(Model):
    """The volume that holds models, data and results."""

    claim_name: SubdomainName | None = Field(
        None,
        description="PersistentVolumeClaim of the namespace. Default: tuneward-store, made when it is absent.",
    )


class Register(Model):
    """How the finished model is called."""

    name: Name | None = Field(None, description="First part of the FineTunedModel's name. Default: the job's name.")
    suffix: Annotated[str, Field(max_length=40, pattern=r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")] | None = Field(
        None, description="Middle part of the name that clients ask for. Default: the job's name."
    )


class Serve(Model):
    """Where the finished model is served."""

    server: Name = Field(description="Name of a ModelServer of this namespace.")


class Retries(Model):
    """How often an attempt is made again, for each class of failure."""

    infrastructure: Int | None = Field(None, ge=0, le=1000, description="Killed pods, lost nodes. Default: 10.")
    preempted: Int | None = Field(None, ge=0, le=10_000, description="Evictions and preemptions. Default: 1000.")
    out_of_memory: Int | None = Field(None, ge=0, le=100, description="Killed for memory. Default: 1.")
    numerical_divergence: Int | None = Field(None, ge=0, le=100, description="Loss not finite, or exploded. Default: 1.")
    hang: Int | None = Field(None, ge=0, le=100, description="No step for hangTimeoutSeconds. Default: 3.")
    user_code: Int | None = Field(None, ge=0, le=100, description="An exception of the training code. Default: 1.")
    unknown: Int | None = Field(None, ge=0, le=100, description="Anything else. Default: 3.")


class RunPolicy(Model):
    """How long and how often."""

    retries: Retries | None = Field(None, description="Retry budgets.")
    start_timeout_seconds: Int | None = Field(
        None,
        ge=10,
        le=604_800,
        description="Longest time from admission to a gang that runs; then it is taken down and tried again. Default: 1800.",
    )
    hang_timeout_seconds: Int | None = Field(
        None,
        ge=10,
        le=604_800,
        description="Longest time without a step while the leader answers; then the gang is taken down and goes on from its "
        "newest checkpoint. Also the longest time that prepare, finish, or a gang that loads, evaluates or saves may "
        "stand still. Default: 1800.",
    )
    active_deadline_seconds: Int | None = Field(
        None,
        ge=1,
        le=31_536_000,
        description="Longest time from acceptance to the end of training; what is trained by then is filed. Default: none.",
    )
    ttl_seconds_after_finished: Int | None = Field(
        None,
        ge=0,
        le=31_536_000,
        description="When pods and Jobs of a finished job are removed; the FineTuneJob itself stays. Default: 86400.",
    )


SUFFIX = "; make a new FineTuneJob under another name, or delete this one first"


def _fixed(field: str) -> Transition:
    return Transition(
        cel=f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        message=f"{field} cannot be changed after creation{SUFFIX}",
    )


class FineTuneJobSpec(Model):
    """What to train, on what, how, and where. After creation only suspend, cancel, runPolicy and serve may change."""

    model: ModelSource = Field(description="What training starts from.")
    datasets: Datasets = Field(description="Training and validation data.")
    objective: Objective | None = Field(None, description="What is learnt of the samples. Default: SFT.")
    method: Method | None = Field(None, description="How the model is adapted. Default: LoRA of rank 16.")
    hyperparameters: Hyperparameters | None = Field(None, description="Numbers of the optimisation.")
    workers: Workers | None = Field(None, description="The pods that train. Default: one pod with one GPU.")
    checkpoint: Checkpoint | None = Field(None, description="How often the state is saved.")
    evaluation: Evaluation | None = Field(None, description="How the result is measured.")
    trackers: Trackers | None = Field(
        None,
        description="Where the figures go too. Default: nowhere but the run directory, where TensorBoard reads them.",
    )
    store: Store | None = Field(None, description="The volume that holds models, data and results.")
    register_: Register | None = Field(None, alias="register", description="How the finished model is called.")
    serve: Serve | None = Field(None, description="Where the finished model is served. Default: nowhere.")
    suspend: bool | None = Field(
        None,
        description="true saves a checkpoint and frees the workers; false goes on from there. Default: false.",
    )
    cancel: bool | None = Field(None, description="true ends the job for good. Default: false.")
    run_policy: RunPolicy | None = Field(None, description="How long and how often.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        *OBJECTIVE_RULES,
        *FULL_RULES,
        *EVALUATION_RULES,
    )
    TRANSITIONS: ClassVar[tuple[Transition, ...]] = (
        *(
            _fixed(field)
            for field in (
                "model",
                "datasets",
                "objective",
                "method",
                "hyperparameters",
                "workers",
                "checkpoint",
                "evaluation",
                "trackers",
                "store",
                "register",
            )
        ),
        Transition(
            cel="!(has(oldSelf.cancel) && oldSelf.cancel) || (has(self.cancel) && self.cancel)",
            message=f"cancel is one way: a cancelled job stays cancelled{SUFFIX}",
        ),
    )


class ProgressStatus(Model):
    """How far the training is, seen from the leader."""

    step: Int = Field(ge=0, description="Optimizer steps done.")
    steps: Int = Field(ge=0, description="Optimizer steps in all.")
    percent: Int = Field(ge=0, le=100, description="Share done.")
    summary: str = Field(max_length=64, description="step/steps, for the column.")
    epoch: float | None = Field(None, description="Passes over the data done.")
    train_loss: float | None = Field(None, description="Training loss of the last step: nats a token, for DPO a pair.")
    loss: str | None = Field(None, max_length=16, description="trainLoss with three digits, for the column.")
    validation_loss: float | None = Field(None, description="Last validation loss: nats a token, for DPO a pair.")
    reward_margin: float | None = Field(
        None, description="DPO: beta times how much more the chosen answers gained than the rejected, last step."
    )
    reward_accuracy: float | None = Field(None, description="DPO: share of the pairs with a margin above 0, last step.")
    tokens_per_second: float | None = Field(None, description="Tokens a second over all workers.")
    eta_seconds: Int | None = Field(None, ge=0, description="Seconds to the last step.")
    memory_bytes: Int | None = Field(None, ge=0, description="What the first rank has taken of its memory so far, at most.")
    mfu: float | None = Field(
        None,
        description="Model FLOPs utilization: share of its GPUs' dense bf16 peak that training needs; none on CPUs.",
    )
    eta: str | None = Field(None, max_length=16, description="etaSeconds in words, for the column.")
    observed_at: str = Field(description="When this was read.", json_schema_extra={"format": "date-time"})


class CheckpointStatus(Model):
    """The newest complete checkpoint."""

    step: Int = Field(ge=0, description="Step it was taken at.")
    digest: str | None = Field(None, max_length=80, description="Digest of its manifest.")
    saved_at: str | None = Field(None, description="When.", json_schema_extra={"format": "date-time"})


class AttemptStatus(Model):
    """One life of a gang."""

    number: Int = Field(ge=1, description="Number, taken in the run directory.")
    launch: Int = Field(ge=1, description="Number of the Job object it ran in.")
    pod_uid: str = Field(alias="podUID", max_length=64, description="UID of its leader's pod.")
    node: str | None = Field(None, max_length=253, description="Node of its leader.")
    started_at: str | None = Field(None, description="When.", json_schema_extra={"format": "date-time"})
    from_step: Int | None = Field(None, ge=0, description="Step it went on from.")
    last_step: Int | None = Field(None, ge=0, description="Last step that was seen.")
    lost_steps: Int | None = Field(None, ge=0, description="Steps after the last checkpoint, done again by the next.")
    resume: str | None = Field(None, max_length=256, description="exact, or equivalent and why.")
    cause: str | None = Field(None, max_length=512, description="Why it ended; absent while it runs.")


class ModelStatus(Model):
    """The model that the job ended in."""

    name: str = Field(max_length=253, description="Name of the FineTunedModel.")
    served_name: str = Field(max_length=253, description="Name that clients ask for.")
    digest: str = Field(max_length=80, description="Digest of its files.")
    validation_loss_before: float | None = Field(None, description="Validation loss of what the job started from.")
    validation_loss_after: float | None = Field(None, description="Its own validation loss.")


RetriesSpent = Annotated[dict[Annotated[str, Field(max_length=63)], Int], Field(max_length=16)]


class FineTuneJobStatus(Model):
    """Written by the operator alone."""

    phase: Phase | None = Field(None, strict=False, description="Where the job is.")
    message: str | None = Field(None, max_length=1024, description="What happened and, if anything, what to do.")
    conditions: list[Condition] | None = Field(
        None,
        max_length=16,
        description="Conditions; Finished is true on every end.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: Int | None = Field(None, ge=0, description="Generation that this status is about.")
    queue: str | None = Field(None, max_length=253, description="Kueue's queue, if one is asked for.")
    accepted_at: str | None = Field(None, description="When work began.", json_schema_extra={"format": "date-time"})
    finished_at: str | None = Field(None, description="When it ended.", json_schema_extra={"format": "date-time"})
    launches: Int | None = Field(None, ge=0, description="Attempt Jobs that have ended; the next is <job>-a<launches+1>.")
    retries: RetriesSpent | None = Field(None, description="Retries spent, by class of failure.")
    retry_at: str | None = Field(
        None,
        description="When what failed is tried again; absent once that has begun.",
        json_schema_extra={"format": "date-time"},
    )
    resolved: Resolved | None = Field(None, description="Every default chosen and every moving part pinned.")
    progress: ProgressStatus | None = Field(None, description="How far the training is.")
    checkpoint: CheckpointStatus | None = Field(None, description="The newest complete checkpoint.")
    attempts: list[AttemptStatus] | None = Field(None, max_length=10, description="The newest ten attempts.")
    attempt_count: Int | None = Field(None, ge=0, description="Attempts in all.")
    trackers: list[TrackerStatus] | None = Field(None, max_length=4, description="The trackers that the job asked for.")
    model: ModelStatus | None = Field(None, description="The model that the job ended in.")


class FineTuneJob(Model):
    """Fine-tunes a language model and ends in a model that answers, or in one sentence that says what to change."""

    api_version: Literal["tuneward.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: dict[str, Any]
    spec: FineTuneJobSpec = Field(description="What is asked for.")
    status: FineTuneJobStatus | None = Field(None, description="What has become of it.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"size(self.metadata.name) <= {MAX_JOB_NAME} && self.metadata.name.matches(r'^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            message=f"metadata.name must have at most {MAX_JOB_NAME} characters of a-z, 0-9 and -, "
            "begin with a letter and end with a letter or digit (pods and a Service are named after it)",
            check=lambda s: fits_name(str(s.metadata.get("name", "")), MAX_JOB_NAME),
        ),
    )
