"""What every pass has at hand, and what is done with every change: caches, queue, clock, and the way to write.

A reconcile is `async def reconcile(app, key) -> float | None`: seconds until it wants to be called again, if nothing
happens before. It reads caches only, and writes through `create`, `delete`, `apply` and `patch_status`, which put what the
API server answered into the caches, so that the next pass knows of it before any watch does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tuneward_api.names import LABEL_JOB
from tuneward_operator.build_server import SERVER
from tuneward_operator.cache import Cache, ObjectKey
from tuneward_operator.health import Metrics
from tuneward_operator.kube import (
    CLAIMS,
    CONFIGMAPS,
    DEPLOYMENTS,
    FINETUNEDMODELS,
    FINETUNEJOBS,
    JOBS,
    MODELSERVERS,
    NODES,
    OWN_KINDS,
    PODS,
    SERVICES,
    WORKLOADS,
    ApiError,
    Kube,
    Object,
    Resource,
)
from tuneward_operator.poll import Board, Pull
from tuneward_operator.queue import Key, KeyedQueue
from tuneward_operator.served import Serving
from tuneward_operator.settings import Settings
from tuneward_operator.views import (
    ClaimView,
    DeploymentView,
    JobView,
    NodeView,
    PodView,
    ResourceView,
    View,
    WorkloadView,
    claim_view,
    deployment_view,
    job_view,
    node_view,
    plain_view,
    pod_view,
    resource_view,
    workload_view,
)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(kw_only=True)
class Caches:
    """One cache a kind. A FineTunedModel's owner is its server; of all else it is the job or the server."""

    jobs: Cache[JobView] = field(default_factory=Cache)
    pods: Cache[PodView] = field(default_factory=Cache)
    nodes: Cache[NodeView] = field(default_factory=Cache)
    claims: Cache[ClaimView] = field(default_factory=Cache)
    deployments: Cache[DeploymentView] = field(default_factory=Cache)
    services: Cache[View] = field(default_factory=Cache)
    configmaps: Cache[View] = field(default_factory=Cache)
    """Of these two only what a server is made of."""
    workloads: Cache[WorkloadView] = field(default_factory=Cache)
    finetunejobs: Cache[ResourceView] = field(default_factory=Cache)
    models: Cache[ResourceView] = field(default_factory=Cache)
    servers: Cache[ResourceView] = field(default_factory=Cache)

    def of(self, kind: str) -> tuple[Cache[Any], Callable[[Object], View]] | None:
        """The cache of a kind and what makes its values; None: not cached."""
        known: dict[str, tuple[Cache[Any], Callable[[Object], View]]] = {
            JOBS.kind: (self.jobs, job_view),
            PODS.kind: (self.pods, pod_view),
            NODES.kind: (self.nodes, node_view),
            CLAIMS.kind: (self.claims, claim_view),
            DEPLOYMENTS.kind: (self.deployments, deployment_view),
            SERVICES.kind: (self.services, plain_view),
            CONFIGMAPS.kind: (self.configmaps, plain_view),
            WORKLOADS.kind: (self.workloads, workload_view),
            FINETUNEJOBS.kind: (self.finetunejobs, resource_view),
            FINETUNEDMODELS.kind: (self.models, resource_view),
            MODELSERVERS.kind: (self.servers, resource_view),
        }
        return known.get(kind)


@dataclass(kw_only=True)
class App:
    settings: Settings
    kube: Kube
    pull: Pull
    """GET from a pod: an agent's report, a leader's progress."""
    queue: KeyedQueue = field(default_factory=KeyedQueue)
    caches: Caches = field(default_factory=Caches)
    metrics: Metrics = field(default_factory=Metrics)
    board: Board = field(default_factory=Board)
    serving: dict[ObjectKey, Serving] = field(default_factory=dict)
    """By server: what its last pass found, for the passes of its models."""
    applied: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    """By uid of a server and kind: digest of what was applied last and the version that this made, so that a pass without
    news writes nothing, and one that finds another version, or none, does."""
    now: Callable[[], datetime] = utc_now
    deaf: set[str] = field(default_factory=set)
    """Kinds of ours whose watch missed a change; only a restart heals it."""

    # What came in

    def seen(self, resource: Resource, event_type: str | None, body: Object) -> None:
        """An event of one of our own kinds, from Kopf."""
        cached = self.caches.of(resource.kind)
        assert cached is not None
        cache, project = cached
        value = project(body)
        if event_type == "DELETED":
            cache.remove(value.key, value.uid)
        else:
            cache.put(value)
        self.changed(resource, value)

    def changed(self, resource: Resource, value: View) -> None:
        """Asks for a pass over everything that this object matters to."""
        if resource in OWN_KINDS:
            urgent = resource == FINETUNEJOBS and not _body(value).get("status", {}).get("phase")
            self.queue.add(
                Key(resource.kind, value.namespace, value.name), urgent=urgent or value.deleting_since is not None
            )
        if resource == FINETUNEDMODELS:
            self._model_changed(value)
        elif resource == MODELSERVERS:
            for model in self.caches.models.owned(value.key):
                self.queue.add(Key(FINETUNEDMODELS.kind, *model.key))
        elif resource in (JOBS, PODS, DEPLOYMENTS, SERVICES, CONFIGMAPS) and value.owner is not None:
            self.queue.add(Key(owner_kind(value), *value.owner))
        elif resource == WORKLOADS and value.owner is not None:
            job = self.caches.jobs.get(*value.owner)
            if job is not None and job.owner is not None:
                self.queue.add(Key(owner_kind(job), *job.owner))

    def _model_changed(self, value: View) -> None:
        if value.owner is not None:
            self.queue.add(Key(MODELSERVERS.kind, *value.owner))
        source = _body(value).get("spec", {}).get("source", {}).get("job")
        if source:
            self.queue.add(Key(FINETUNEJOBS.kind, value.namespace, source))

    # What goes out

    async def create(self, body: Object) -> tuple[Object | None, bool]:
        """Once; see Kube.create. What is there in the end is in the cache."""
        found, made = await self.kube.create(body)
        if made:
            self.metrics.created.labels(body["kind"]).inc()
        if found is not None:
            self._remember(body["kind"], found)
        return found, made

    async def apply(self, body: Object) -> Object:
        """For what converges: a server's Deployment, Service and ConfigMap."""
        found = await self.kube.apply(body)
        self._remember(body["kind"], found)
        return found

    async def delete(self, resource: Resource, value: View) -> None:
        """This very object, with its dependants; gone already is fine."""
        there = await self.kube.delete(resource, value.namespace, value.name, uid=value.uid)
        cached = self.caches.of(resource.kind)
        if not there and cached is not None:
            cached[0].remove(value.key, value.uid)

    async def patch_status(self, resource: Resource, of: ResourceView, status: Object) -> bool:
        """Writes the whole status where it differs from what was seen. False: the object is gone, and forgotten."""
        if status == of.status:
            return True
        try:
            found = await self.kube.apply_status(resource, of.namespace, of.name, of.uid, status)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            self.forget(resource, of)
            return False
        self.metrics.status_writes.labels(resource.kind).inc()
        self._remember(resource.kind, found)
        return True

    def forget(self, resource: Resource, value: View) -> None:
        """A 404 on an owner: it is gone, whatever the watch has said or not."""
        cached = self.caches.of(resource.kind)
        if cached is not None:
            cached[0].remove(value.key, value.uid)
        self.queue.forget(Key(resource.kind, *value.key))

    async def live(self, resource: Resource, of: ResourceView) -> ResourceView | None:
        """The object as it is now; None, and forgotten, where it or that uid of it is gone or going."""
        found = await self.kube.get(resource, of.namespace, of.name)
        if found is None or found["metadata"]["uid"] != of.uid:
            self.forget(resource, of)
            return None
        self._remember(resource.kind, found)
        value = resource_view(found)
        return None if value.deleting_since is not None else value

    def _remember(self, kind: str, found: Object) -> None:
        cached = self.caches.of(kind)
        if cached is not None:
            cache, project = cached
            value = project(found)
            if kind not in (SERVICES.kind, CONFIGMAPS.kind) or value.role == SERVER:
                cache.put(value)


def owner_kind(value: View) -> str:
    """Children of a job carry its label; what has an owner and no such label is a server's."""
    return FINETUNEJOBS.kind if LABEL_JOB in value.labels else MODELSERVERS.kind


def _body(value: View) -> Object:
    return value.body if isinstance(value, ResourceView) else {}
