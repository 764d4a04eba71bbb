"""Folds what the caches hold of one FineTuneJob into frozen values, so that `decide` knows neither Jobs nor pods.

A Job's conditions end here: another kind of gang (JobSet, core workloads) would be folded into the same `Gang`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from pydantic import ValidationError

from tuneward_api.conditions import Reason
from tuneward_api.failures import Failure, classify
from tuneward_api.files import FinishReport, Parent, Plan, PrepareReport, Report, Result
from tuneward_api.finetunedmodel import FineTunedModelSpec
from tuneward_api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from tuneward_api.names import GRACE_PERIOD_SECONDS, LABEL_JOB_UID, LABEL_SERVER
from tuneward_api.uris import parse_uri
from tuneward_operator import inputs
from tuneward_operator.app import Caches
from tuneward_operator.build import ATTEMPT, FINISH, PREPARE, Owner
from tuneward_operator.cache import Cache, ObjectKey
from tuneward_operator.poll import Board, Heard
from tuneward_operator.tolerant import parse, tolerant
from tuneward_operator.views import JobView, NodeView, PodView, ResourceView, WorkloadView

NODE_GRACE = timedelta(seconds=GRACE_PERIOD_SECONDS + 60)
"""A node that was silent for so long runs none of our processes that could still write a checkpoint in its grace."""

UNREADABLE = FineTuneJobSpec.model_validate(
    {"model": {"uri": "pvc://unknown/unknown"}, "datasets": {"training": [{"uri": "pvc://unknown/unknown"}]}}
)
"""Stands for a spec that this version cannot read; nothing is ever made from it."""

BROKEN = frozenset({Reason.DIGEST_MISMATCH, Reason.NOT_FINITE})
"""Reasons of a FineTunedModel that is not Ready which are about its files. The others are about a server that shall serve
it, and say nothing about going on from it."""

MAX_TOLD = 300

Outcome = Literal["Running", "Succeeded", "Failed"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One pod. `lost`: its node is gone or was silent for longer than the grace, so nothing of it runs."""

    pod: str
    uid: str
    index: int
    node: str
    ip: str
    launch: int
    phase: str
    deleting: bool
    lost: bool
    started_at: datetime | None
    exit_code: int | None
    reason: str
    message: str
    disruption: str
    result: Result | None = None
    heard: Heard | None = None

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def left(self) -> bool:
        """Whether a process of it may still run."""
        return not self.ended and not self.lost


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One launch: an attempt Job and the pods of its present life."""

    job: JobView
    launch: int
    outcome: Outcome
    suspended: bool
    workers: tuple[Worker, ...]
    queue_says: str = ""
    """Why its queue lets it wait."""

    @property
    def leader(self) -> Worker | None:
        return next((worker for worker in self.workers if worker.index == 0), None)

    @property
    def lost_workers(self) -> tuple[Worker, ...]:
        """Those whose end ends the attempt. Where the queue suspended the Job, leaving is no loss."""
        if self.suspended:
            return ()
        return tuple(worker for worker in self.workers if worker.phase == "Failed" or worker.deleting or worker.lost)


@dataclass(frozen=True, kw_only=True)
class Helper:
    """A prepare or finish Job and what it said."""

    job: JobView
    ended: bool
    report: Report | None
    failure: Failure
    """What ended it, where it ended without saying Done."""
    waits_for: str
    """What its pod says while it does not run."""
    pod_phase: str = ""
    """Empty: there is no pod."""

    def over(self, failure: Failure) -> Helper:
        """The same, given up."""
        return replace(self, ended=True, failure=failure)


@dataclass(frozen=True, kw_only=True)
class Served:
    """The FineTunedModel's Ready."""

    ready: bool
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that a decision rests on."""

    owner: Owner
    generation: int
    status: FineTuneJobStatus
    refusal: str = ""
    """Why the spec cannot be read by this version; empty: it can."""
    prepare: Helper | None = None
    finish: Helper | None = None
    gang: Gang | None = None
    workers: tuple[Worker, ...] = ()
    """Pods of all launches that still have an object."""
    attempts: tuple[JobView, ...] = ()
    """All attempt Jobs."""
    helpers_left: bool = False
    claim_missing: bool = False
    nodes: int | None = None
    parent: Parent | None = None
    """The model that the job goes on from (spec.model.uri model://NAME)."""
    input_problem: str = ""
    """Why what it reads cannot be read now; empty: it can."""
    plan: Plan | None = None
    plan_sought: bool = False
    model_server: str | None = None
    """The server that the model's label names; empty: none. None: there is no model."""
    served: Served | None = None


def observe(view: ResourceView, caches: Caches, board: Board, now: datetime) -> Seen:
    """From the caches alone."""
    owner, refusal = read_owner(view)
    status = tolerant(FineTuneJobStatus, view.status)
    key = ObjectKey(view.namespace, view.name)
    # A job of the same name that was deleted a moment ago may still have children here.
    jobs = [job for job in caches.jobs.owned(key) if job.labels.get(LABEL_JOB_UID) == view.uid]
    pods = [pod for pod in caches.pods.owned(key) if pod.labels.get(LABEL_JOB_UID) == view.uid]
    workers = tuple(_worker(pod, caches.nodes, board, now) for pod in pods if pod.role == ATTEMPT)
    attempts = tuple(job for job in jobs if job.role == ATTEMPT)
    model = caches.models.get(view.namespace, status.model.name) if status.model is not None else None
    parent, problem = parent_of(owner, caches.models)
    sources = [*inputs.inputs_of(owner.spec, parent)]
    claims = {name: caches.claims.get(view.namespace, name) for name in inputs.claims(sources, owner.store_claim)}
    there = {name for name, claim in claims.items() if claim is not None}
    held = tuple(name for name, claim in claims.items() if claim is not None and claim.one_node)
    return Seen(
        owner=replace(owner, held=held, gang_held=inputs.of_gang(held, sources, owner.store_claim)),
        generation=view.generation,
        status=status,
        refusal=refusal,
        prepare=helper_of(PREPARE, jobs, pods, PrepareReport),
        finish=helper_of(FINISH, jobs, pods, FinishReport),
        gang=_gang((status.launches or 0) + 1, attempts, pods, workers, caches.workloads),
        workers=workers,
        attempts=attempts,
        helpers_left=any(pod.role != ATTEMPT and pod.phase in ("Pending", "Running") for pod in pods),
        claim_missing=owner.store_claim not in there,
        nodes=len(caches.nodes) or None,
        parent=parent,
        input_problem=problem or inputs.missing_claim(sources, owner.store_claim, there),
        model_server=model.labels.get(LABEL_SERVER, "") if model is not None else None,
        served=_served(model),
    )


def read_owner(view: ResourceView) -> tuple[Owner, str]:
    """The job, and why its spec cannot be read: a newer CRD may hold fields that this version does not know."""
    refusal = ""
    try:
        spec = FineTuneJobSpec.model_validate(view.spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("spec", *first["loc"]))
        refusal = f"{where}: {first['msg']} (this operator cannot read the spec; is it older than the CRD?)"
        spec = UNREADABLE
    metadata = view.body["metadata"]
    owner = Owner(
        namespace=view.namespace,
        name=view.name,
        uid=view.uid,
        spec=spec,
        labels=dict(metadata.get("labels") or {}),
        annotations=dict(metadata.get("annotations") or {}),
    )
    return owner, refusal


def parent_of(owner: Owner, models: Cache[ResourceView]) -> tuple[Parent | None, str]:
    """The FineTunedModel that the job goes on from, or why there is none to go on from."""
    uri = parse_uri(owner.spec.model.uri)
    if uri.scheme != "model":
        return None, ""
    name = uri.authority
    found = models.get(owner.namespace, name)
    if found is None or found.deleting_since is not None:
        gone = "does not exist" if found is None else "is being deleted"
        return None, f"FineTunedModel {name} (spec.model.uri) {gone}; `kubectl get ftm` lists those of this namespace"
    if found.spec.get("archived"):
        return None, f"FineTunedModel {name} (spec.model.uri) is archived; set its spec.archived to false, or name another"
    served = _served(found)
    if served is not None and not served.ready and served.reason in BROKEN:
        return None, f"FineTunedModel {name} (spec.model.uri) cannot be gone on from: {served.message}"
    try:
        spec = tolerant(FineTunedModelSpec, found.spec)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        unread = f"FineTunedModel {name} (spec.model.uri) cannot be read at spec.{where}"
        return None, f"{unread}; is this operator older than the CRD?"
    parent = Parent(
        name=name,
        base_uri=spec.base.uri,
        base_digest=spec.base.digest,
        artifact_uri=spec.artifact.uri,
        artifact_digest=spec.artifact.digest,
        whole=spec.adapter is None or None,
    )
    return parent, ""


def _worker(pod: PodView, nodes: Cache[NodeView], board: Board, now: datetime) -> Worker:
    return Worker(
        pod=pod.name,
        uid=pod.uid,
        index=pod.index,
        node=pod.node,
        ip=pod.ip,
        launch=pod.launch,
        phase=pod.phase,
        deleting=pod.deleting_since is not None,
        lost=_lost(pod, nodes, now),
        started_at=pod.started_at,
        exit_code=pod.exit_code,
        reason=pod.reason,
        message=pod.message,
        disruption=pod.disruption,
        result=parse(Result, pod.message),
        heard=board.of(pod.uid),
    )


def _lost(pod: PodView, nodes: Cache[NodeView], now: datetime) -> bool:
    """Without any node in the cache (Roles only) nothing is known, and the pod's own end is waited for."""
    if not pod.node or len(nodes) == 0 or pod.deleting_since is None:
        return False
    node = nodes.get("", pod.node)
    if node is None:
        return True
    return not node.ready and node.ready_since is not None and now - node.ready_since > NODE_GRACE


def _gang(
    launch: int,
    attempts: tuple[JobView, ...],
    pods: list[PodView],
    workers: tuple[Worker, ...],
    workloads: Cache[WorkloadView],
) -> Gang | None:
    job = next((found for found in attempts if found.launch == launch), None)
    if job is None:
        return None
    # A Job that its queue suspended and let in again may still have pods of its former life: they end on their own.
    mine = {
        pod.uid
        for pod in pods
        if pod.owner_uid == job.uid
        and not (job.started_at is not None and pod.created_at is not None and pod.created_at < job.started_at)
    }
    said = [workload.message for workload in workloads.owned(job.key) if workload.message]
    return Gang(
        job=job,
        launch=launch,
        outcome=_outcome(job),
        suspended=job.suspended,
        workers=tuple(worker for worker in workers if worker.uid in mine),
        queue_says=next(iter(said), ""),
    )


def _outcome(job: JobView) -> Outcome:
    """FailureTarget comes while pods still hang on a dead node; Failed would never come."""
    if "Complete" in job.conditions or "SuccessCriteriaMet" in job.conditions:
        return "Succeeded"
    if "Failed" in job.conditions or "FailureTarget" in job.conditions:
        return "Failed"
    return "Running"


def helper_of(role: str, jobs: list[JobView], pods: list[PodView], model: type[Report]) -> Helper | None:
    job = next((found for found in jobs if found.role == role), None)
    if job is None:
        return None
    mine = [pod for pod in pods if pod.owner_uid == job.uid]
    pod = max(mine, key=lambda found: found.version, default=None)
    ended = _outcome(job) != "Running" or (pod is not None and (pod.phase in ("Succeeded", "Failed")))
    report = parse(model, pod.message) if pod is not None and ended else None
    return Helper(
        job=job,
        ended=ended,
        report=report,
        failure=_failure(role, pod, report),
        waits_for="" if pod is None or pod.phase != "Pending" else pod.message or pod.reason,
        pod_phase="" if pod is None else pod.phase,
    )


def _failure(role: str, pod: PodView | None, report: Report | None) -> Failure:
    if report is not None and report.outcome == "Failed":
        return classify(exit_code=pod.exit_code if pod else None, reason=report.reason, message=report.message)
    exit_code = pod.exit_code if pod is not None else None
    if exit_code == 0:
        sentence = f"the {role} pod ended without a report"
        return Failure(failure_class=classify(exit_code=None).failure_class, reason=Reason.INFRASTRUCTURE, sentence=sentence)
    known = classify(
        exit_code=exit_code,
        reason=disrupted(pod.disruption) or pod.reason if pod else None,
        message=told(pod.message) if pod else None,
    )
    return Failure(
        failure_class=known.failure_class,
        reason=known.reason,
        sentence=re.sub(r"\b(a worker's pod|a worker|the worker)\b", f"the {role} pod", known.sentence),
    )


def told(message: str) -> str | None:
    """The kubelet's or the runtime's own word on a pod's end, such as what the node was low on, or which program is not
    there; the last words of our processes are JSON."""
    return message[:MAX_TOLD] if message and not message.startswith("{") else None


def disrupted(reason: str) -> str:
    """A pod's DisruptionTarget in the words of `failures`: a more important pod took its place, or the node went."""
    return {
        "": "",
        "PreemptionByScheduler": Reason.PREEMPTED,
        "EvictionByEvictionAPI": "Evicted",
        "DeletionByTaintManager": "NodeLost",
        "DeletionByPodGC": "NodeLost",
        "TerminationByKubelet": "TerminationByKubelet",
    }.get(reason, "Evicted")


def _served(model: ResourceView | None) -> Served | None:
    """None: there is no model, or it says nothing yet."""
    for condition in model.status.get("conditions") or () if model is not None else ():
        if condition["type"] == "Ready":
            return Served(ready=condition["status"] == "True", reason=condition["reason"], message=condition["message"])
    return None
