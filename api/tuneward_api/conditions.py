"""Phases, condition types and reasons: one vocabulary for status, for `tuneward train` and for the docs."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from tuneward_api.base import Int, Model


class Phase(StrEnum):
    """Where a FineTuneJob is. The last three are final."""

    PENDING = "Pending"
    VALIDATING = "Validating"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUSPENDED = "Suspended"
    CANCELLING = "Cancelling"
    REGISTERING = "Registering"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


FINAL_PHASES = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})


class ConditionType(StrEnum):
    """Conditions of our kinds. FineTuneJob has no Ready: it would block GitOps waits for hours."""

    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    ACCEPTED = "Accepted"
    ADMITTED = "Admitted"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SERVED = "Served"
    COMPLETE = "Complete"
    FAILED = "Failed"
    FINISHED = "Finished"
    READY = "Ready"


class Reason(StrEnum):
    """Every reason that a condition, an event, a report or the command can give."""

    # On the way
    PENDING = "Pending"
    VALIDATING = "Validating"
    VALIDATED = "Validated"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    WAITING_FOR_PODS = "WaitingForPods"
    TRAINING = "Training"
    RESTARTING = "Restarting"
    WAITING_FOR_OLD_PODS = "WaitingForOldPods"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    CANCELLING = "Cancelling"
    REGISTERING = "Registering"
    PROGRESS_STALE = "ProgressStale"
    # Ends
    SUCCEEDED = "Succeeded"
    CANCELLED = "Cancelled"
    GATE_REFUSED = "GateRefused"
    DATA_INVALID = "DataInvalid"
    CONFIG_INVALID = "ConfigInvalid"
    MODEL_UNSUPPORTED = "ModelUnsupported"
    INPUT_MISSING = "InputMissing"
    STORE_NOT_WRITABLE = "StoreNotWritable"
    OUT_OF_MEMORY = "OutOfMemory"
    INFRASTRUCTURE = "Infrastructure"
    PREEMPTED = "Preempted"
    HANG = "Hang"
    NUMERICAL_DIVERGENCE = "NumericalDivergence"
    USER_CODE = "UserCode"
    UNKNOWN = "Unknown"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    START_TIMEOUT = "StartTimeout"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    OBJECT_REFUSED = "ObjectRefused"
    # Models and servers
    VERIFIED = "Verified"
    SERVED = "Served"
    NOT_SERVED = "NotServed"
    SERVER_MISSING = "ServerMissing"
    SERVER_NOT_READY = "ServerNotReady"
    BASE_MISMATCH = "BaseMismatch"
    LOADING = "Loading"
    DIGEST_MISMATCH = "DigestMismatch"
    STRUCTURE_MISMATCH = "StructureMismatch"
    NOT_FINITE = "NotFinite"
    RANK_TOO_LARGE = "RankTooLarge"
    TOO_MANY_ADAPTERS = "TooManyAdapters"
    NO_EFFECT = "NoEffect"
    PROOF_FAILED = "ProofFailed"
    LOAD_FAILED = "LoadFailed"
    ARTIFACT_MISSING = "ArtifactMissing"
    ARCHIVED = "Archived"
    FETCHING_MODEL = "FetchingModel"
    AVAILABLE = "Available"
    UNAVAILABLE = "Unavailable"


class FailureClass(StrEnum):
    """What kind of failure ended an attempt; each has a retry budget (`failures.py`)."""

    INVALID_INPUT = "InvalidInput"
    INVALID_CONFIG = "InvalidConfig"
    OUT_OF_MEMORY = "OutOfMemory"
    INFRASTRUCTURE = "Infrastructure"
    PREEMPTED = "Preempted"
    HANG = "Hang"
    NUMERICAL_DIVERGENCE = "NumericalDivergence"
    USER_CODE = "UserCode"
    UNKNOWN = "Unknown"


class Condition(Model):
    """A condition as Kubernetes' API conventions have it."""

    type: str = Field(description="Name of the condition.", max_length=64)
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    reason: str = Field(description="One CamelCase word why; the reference lists all.", max_length=64)
    message: str = Field(description="What happened and what to do.", max_length=1024)
    last_transition_time: str = Field(description="When `status` last changed.", json_schema_extra={"format": "date-time"})
    observed_generation: Int | None = Field(None, description="The generation that this is about.", ge=0)
