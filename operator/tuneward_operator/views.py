"""Slim frozen values of what is watched: what a pass needs of an object, about a tenth of what the API server sends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuneward_api.names import LABEL_JOB, LABEL_LAUNCH, LABEL_ROLE, LABEL_SERVER
from tuneward_operator.cache import ObjectKey


def instant(text: str | None) -> datetime | None:
    """RFC 3339, as the API server writes it."""
    return datetime.fromisoformat(text) if text else None


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What every kind has."""

    namespace: str
    name: str
    uid: str
    version: int
    labels: dict[str, str]
    created_at: datetime | None
    deleting_since: datetime | None

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.namespace, self.name)

    @property
    def owner(self) -> ObjectKey | None:
        """The ModelServer or FineTuneJob that it belongs to, told by our labels; a model's server comes before its job."""
        name = self.labels.get(LABEL_SERVER) or self.labels.get(LABEL_JOB)
        return ObjectKey(self.namespace, name) if name else None

    @property
    def role(self) -> str:
        return self.labels.get(LABEL_ROLE, "")

    @property
    def launch(self) -> int:
        """Number of the attempt Job that it is or belongs to; 0: none."""
        text = self.labels.get(LABEL_LAUNCH, "")
        return int(text) if text.isdecimal() else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceView(View):
    """One of our own kinds, whole but for managedFields."""

    body: dict[str, Any]

    @property
    def generation(self) -> int:
        return int(self.body["metadata"].get("generation", 0))

    @property
    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body.get("spec", {})
        return found

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body.get("status", {})
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView(View):
    suspended: bool
    started_at: datetime | None
    conditions: dict[str, str]
    """Type to message, of those that are True."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PodView(View):
    phase: str
    index: int
    node: str
    ip: str
    ready: bool
    started_at: datetime | None
    ended_at: datetime | None
    exit_code: int | None
    reason: str
    message: str
    """The termination message of the main container; while it does not run, why not."""
    disruption: str
    """Reason of the condition DisruptionTarget: who took the pod away."""
    owner_uid: str
    """UID of its Job."""
    annotations: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeView(View):
    ready: bool
    ready_since: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimView(View):
    phase: str
    access_modes: tuple[str, ...]

    @property
    def one_node(self) -> bool:
        """Whether only one node at a time can mount it."""
        return set(self.access_modes) <= {"ReadWriteOnce", "ReadWriteOncePod"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentView(View):
    generation: int
    """Unlike its version it moves only with what was asked for."""
    observed_generation: int
    replicas: int
    ready_replicas: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadView(View):
    """Kueue's word on a Job."""

    job: str
    message: str
    """Why the Job waits; empty: it was let in, or nothing is known."""

    @property
    def owner(self) -> ObjectKey | None:
        """The Job."""
        return ObjectKey(self.namespace, self.job) if self.job else None


def _common(item: dict[str, Any]) -> dict[str, Any]:
    metadata = item["metadata"]
    return {
        "namespace": metadata.get("namespace", ""),
        "name": metadata["name"],
        "uid": metadata["uid"],
        "version": int(metadata["resourceVersion"]),
        "labels": metadata.get("labels") or {},
        "created_at": instant(metadata.get("creationTimestamp")),
        "deleting_since": instant(metadata.get("deletionTimestamp")),
    }


def plain_view(item: dict[str, Any]) -> View:
    return View(**_common(item))


def resource_view(item: dict[str, Any]) -> ResourceView:
    metadata = {key: value for key, value in item["metadata"].items() if key != "managedFields"}
    return ResourceView(**_common(item), body={**item, "metadata": metadata})


def job_view(item: dict[str, Any]) -> JobView:
    status = item.get("status", {})
    return JobView(
        **_common(item),
        suspended=bool(item["spec"].get("suspend", False)),
        started_at=instant(status.get("startTime")),
        conditions={
            found["type"]: found.get("message", "") for found in status.get("conditions") or () if found["status"] == "True"
        },
    )


def pod_view(item: dict[str, Any]) -> PodView:
    status = item.get("status", {})
    annotations = item["metadata"].get("annotations") or {}
    conditions = {found["type"]: found for found in status.get("conditions") or ()}
    ended, running, waiting = _container(status)
    scheduled = conditions.get("PodScheduled", {})
    unscheduled = scheduled.get("message", "") if scheduled.get("status") == "False" else ""
    owners = item["metadata"].get("ownerReferences") or ()
    index = annotations.get("batch.kubernetes.io/job-completion-index", "")
    return PodView(
        **_common(item),
        phase=status.get("phase", "Pending"),
        index=int(index) if index.isdecimal() else 0,
        node=item["spec"].get("nodeName", ""),
        ip=status.get("podIP", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        started_at=instant(running.get("startedAt") or ended.get("startedAt")),
        ended_at=instant(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or status.get("reason") or waiting.get("reason", ""),
        message=ended.get("message") or status.get("message") or waiting.get("message") or unscheduled,
        disruption=_disruption(conditions),
        owner_uid=next((owner["uid"] for owner in owners if owner.get("controller")), ""),
        annotations={key: value for key, value in annotations.items() if key.startswith("tuneward.dev/")},
    )


def workload_view(item: dict[str, Any]) -> WorkloadView:
    owners = item["metadata"].get("ownerReferences") or ()
    return WorkloadView(
        **_common(item),
        job=next((owner["name"] for owner in owners if owner["kind"] == "Job" and owner.get("controller")), ""),
        message=_why_not_admitted(item),
    )


def _why_not_admitted(item: dict[str, Any]) -> str:
    """First quota is reserved, and then admission checks have their say."""
    status = item.get("status", {})
    conditions = {found["type"]: found for found in status.get("conditions") or ()}
    if item.get("spec", {}).get("active") is False:
        return f"Workload {item['metadata']['name']} was deactivated; set its spec.active to true to let it in again"
    reserved, admitted = conditions.get("QuotaReserved", {}), conditions.get("Admitted", {})
    if reserved.get("status") != "True":
        return str(reserved.get("message", ""))
    if admitted.get("status") == "True":
        return ""
    checks = [
        f"{check['name']}: {check['message']}" for check in status.get("admissionChecks") or () if check.get("message")
    ]
    return "; ".join(checks) or str(admitted.get("message", ""))


def _container(status: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(terminated, running, waiting) of the first container; the others are empty."""
    for found in status.get("containerStatuses") or ():
        state = found.get("state") or {}
        return state.get("terminated") or {}, state.get("running") or {}, state.get("waiting") or {}
    return {}, {}, {}


def _disruption(conditions: dict[str, dict[str, Any]]) -> str:
    found = conditions.get("DisruptionTarget", {})
    return str(found.get("reason", "")) if found.get("status") == "True" else ""


def node_view(item: dict[str, Any]) -> NodeView:
    conditions = {found["type"]: found for found in item.get("status", {}).get("conditions") or ()}
    ready = conditions.get("Ready", {})
    return NodeView(
        **_common(item),
        ready=ready.get("status") == "True",
        ready_since=instant(ready.get("lastTransitionTime")),
    )


def claim_view(item: dict[str, Any]) -> ClaimView:
    return ClaimView(
        **_common(item),
        phase=item.get("status", {}).get("phase", ""),
        access_modes=tuple(item["spec"].get("accessModes") or ()),
    )


def deployment_view(item: dict[str, Any]) -> DeploymentView:
    status = item.get("status", {})
    return DeploymentView(
        **_common(item),
        generation=int(item["metadata"].get("generation", 0)),
        observed_generation=int(status.get("observedGeneration", 0)),
        replicas=int(status.get("replicas", 0)),
        ready_replicas=int(status.get("readyReplicas", 0)),
    )
