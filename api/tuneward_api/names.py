"""Names that more than one part must spell the same way: group, labels, environment, paths, ports, exit codes."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Final

GROUP: Final = "tuneward.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"

# Labels on every child, so that one selector finds what belongs to a job.
LABEL_JOB: Final = f"{GROUP}/job"
LABEL_JOB_UID: Final = f"{GROUP}/job-uid"
LABEL_ROLE: Final = f"{GROUP}/role"
LABEL_LAUNCH: Final = f"{GROUP}/launch"
LABEL_SERVER: Final = f"{GROUP}/server"
"""On a FineTunedModel: the ModelServer of the same namespace that shall serve it."""
LABEL_SERVER_UID: Final = f"{GROUP}/server-uid"
LABEL_CLAIM: Final = f"claim.{GROUP}"
"""Prefix of labels that name a claim. Only on pods of claims that one node at a time can mount."""
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
ANNOTATION_WANTED: Final = f"{GROUP}/wanted-digest"
"""Bumped on a server's pods: a changed ConfigMap alone reaches a pod only after up to 90 s."""
FIELD_MANAGER: Final = "tuneward-operator"
STATUS_FIELD_MANAGER: Final = "tuneward-status"

# Where a pod finds its inputs; a workstation sets the environment variable to another folder.
REQUEST_FILE: Final = "/etc/tuneward/request.json"
PLAN_FILE: Final = "/etc/tuneward/plan.json"
WANTED_FILE: Final = "/etc/tuneward/adapters/adapters.json"
ENV_STORE_DIR: Final = "TUNEWARD_STORE_DIR"  # default /mnt/store: the whole store (prepare, finish, fetch)
ENV_CLAIMS_DIR: Final = "TUNEWARD_CLAIMS_DIR"  # default /mnt/claims: other claims, one folder each, read-only
ENV_CONFIGMAPS_DIR: Final = "TUNEWARD_CONFIGMAPS_DIR"  # default /mnt/configmaps: <name>/<key>
ENV_MODEL_DIR: Final = "TUNEWARD_MODEL_DIR"  # default /mnt/model
ENV_DATA_DIR: Final = "TUNEWARD_DATA_DIR"  # default /mnt/data
ENV_RUN_DIR: Final = "TUNEWARD_RUN_DIR"  # default /mnt/run
ENV_ADAPTERS_DIR: Final = "TUNEWARD_ADAPTERS_DIR"  # default /mnt/adapters
ENV_TERMINATION_LOG: Final = "TUNEWARD_TERMINATION_LOG"  # default /dev/termination-log
ENV_PROFILE: Final = "TUNEWARD_PROFILE"  # FROM-TO: steps of which the leader keeps a trace
ENV_COMPILE: Final = "TUNEWARD_COMPILE"  # 0: no layer is compiled; 1: on a CPU too. Unset: on GPUs
ENV_POD_NAME: Final = "POD_NAME"
ENV_POD_UID: Final = "POD_UID"
ENV_POD_IP: Final = "POD_IP"
ENV_NODE_NAME: Final = "NODE_NAME"
DEFAULT_DIRS: Final = {
    ENV_STORE_DIR: "/mnt/store",
    ENV_CLAIMS_DIR: "/mnt/claims",
    ENV_CONFIGMAPS_DIR: "/mnt/configmaps",
    ENV_MODEL_DIR: "/mnt/model",
    ENV_DATA_DIR: "/mnt/data",
    ENV_RUN_DIR: "/mnt/run",
    ENV_ADAPTERS_DIR: "/mnt/adapters",
}
DEFAULT_TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_MESSAGE_LIMIT: Final = 4000
"""Bytes. The kubelet cuts at 4,096; a cut JSON is no JSON."""

DEFAULT_STORE_CLAIM: Final = "tuneward-store"
TRAINER_PORT: Final = 8787
ENGINE_PORT: Final = 8000
AGENT_PORT: Final = 8001
GRACE_PERIOD_SECONDS: Final = 120
DEFAULT_HANG_SECONDS: Final = 1800
"""spec.runPolicy.hangTimeoutSeconds, where it says nothing."""

MAX_JOB_NAME: Final = 48
"""A Service name and a pod's host name have 63 characters; ours append up to 15."""
MAX_MESSAGE: Final = 1024


class ExitCode(IntEnum):
    """How a process of ours ends (sysexits.h where it has a word for it)."""

    OK = 0
    DATA_BAD = 65
    INPUT_MISSING = 66
    TRY_AGAIN = 75
    CONFIG_BAD = 78
    STOPPED = 143


def hashed(name: str, limit: int = 63) -> str:
    """`name`, cut to `limit` characters with a hash of the whole at its end when it is longer."""
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9].rstrip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def fits_name(name: str, limit: int) -> bool:
    """Whether `name` can name a Service and, with our endings, pods: an RFC 1035 label of at most `limit`."""
    allowed = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
    fits = bool(name) and len(name) <= limit and set(name) <= allowed
    return fits and name[0].isalpha() and not name.endswith("-")


def claim_label(claim: str) -> str:
    return f"{LABEL_CLAIM}/{hashed(claim)}"


def run_directory(job_name: str, job_uid: str) -> str:
    """The job's folder below the store's root. A workstation has no uid and passes an empty one."""
    return f"jobs/{job_name}-{job_uid[:8]}" if job_uid else f"jobs/{job_name}"


def adapter_directory(digest: str) -> str:
    """`sha256:<hex>` -> the finished adapter's folder below the store's root."""
    return f"adapters/sha256-{digest.removeprefix('sha256:')}"


def whole_model_directory(digest: str) -> str:
    """The same of a model that was trained whole."""
    return f"tuned/sha256-{digest.removeprefix('sha256:')}"


def model_name(prefix: str, digest: str) -> str:
    """Name of the FineTunedModel: `<spec.register.name, or the job's name>-<digest8>`."""
    return f"{prefix}-{digest.removeprefix('sha256:')[:8]}"


def served_name(base: str, suffix: str, date: str, digest: str) -> str:
    """`ft:<base>:<suffix>:<yyyymmdd>:<digest8>`, the name a client asks for. It holds the digest, so nothing
    is ever loaded under an old name."""
    short = base.rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    return f"ft:{short}:{suffix}:{date}:{digest.removeprefix('sha256:')[:8]}"
