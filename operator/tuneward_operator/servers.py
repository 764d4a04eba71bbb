"""ModelServer: one pass. Its base model is fetched once; then what serves it converges, and its agents are asked."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from tuneward_api.conditions import ConditionType, Reason
from tuneward_api.files import AgentReport, Base, FetchReport, canonical_json
from tuneward_api.modelserver import ModelServerSpec, ModelServerStatus
from tuneward_api.names import AGENT_PORT, ANNOTATION_WANTED, LABEL_SERVER_UID, MAX_MESSAGE
from tuneward_api.uris import parse_uri
from tuneward_operator import build, build_server
from tuneward_operator.app import App, Caches
from tuneward_operator.build_server import FETCH, SERVER, BasePlace, Server
from tuneward_operator.cache import ObjectKey
from tuneward_operator.events import post_event
from tuneward_operator.kube import (
    CONFIGMAPS,
    DEPLOYMENTS,
    FINETUNEDMODELS,
    JOBS,
    MODELSERVERS,
    RESOURCES,
    SERVICES,
    ApiError,
    Object,
)
from tuneward_operator.observe import Helper, helper_of
from tuneward_operator.poll import PULL_ERRORS
from tuneward_operator.queue import Key
from tuneward_operator.served import Replica, Serving, Verdict, asks_of
from tuneward_operator.status import make_condition
from tuneward_operator.tolerant import tolerant
from tuneward_operator.views import DeploymentView, PodView, ResourceView, View
from tuneward_operator.waiting import why

logger = logging.getLogger(__name__)

SOON, CALM, FETCH_AGAIN = 1.0, 10.0, 60.0
"""Seconds to the next look: while something is on its way, when all is settled, and after a fetch that failed."""

UNREADABLE = ModelServerSpec.model_validate({"model": {"uri": "pvc://unknown/unknown"}})
"""Stands for a spec that this version cannot read; nothing is ever made from it."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that a pass rests on."""

    server: Server
    generation: int
    status: ModelServerStatus
    refusal: str = ""
    fetch: Helper | None = None
    pods: tuple[PodView, ...] = ()
    models: tuple[ResourceView, ...] = ()
    claim_missing: bool = False
    nodes: int = 1
    versions: Mapping[str, int] = field(default_factory=dict)
    """Of what it is made of and is there, by kind: what somebody deleted or changed is applied again."""

    @property
    def base(self) -> BasePlace | None:
        status = self.status
        if not (status.base_digest and status.base_claim and status.base_path):
            return None
        return BasePlace(claim=status.base_claim, path=status.base_path)

    @property
    def ready_pods(self) -> list[PodView]:
        return [pod for pod in self.pods if pod.ready and pod.deleting_since is None]


async def reconcile(app: App, key: Key) -> float | None:
    view = app.caches.servers.get(key.namespace, key.name)
    if view is None or view.deleting_since is not None:
        _tell_models(app, ObjectKey(key.namespace, key.name), None)
        app.queue.forget(key)
        return None
    seen = observe(view, app.caches)
    try:
        serving, wake, base = await converge(app, view, seen)
    except ApiError as error:
        if not error.refused:
            raise
        message = f"the API server refused an object of this server: {error.message}"
        serving, wake, base = waiting(seen, Reason.OBJECT_REFUSED, message), FETCH_AGAIN, None
    _tell_models(app, view.key, serving)
    status = status_of(app, seen, serving, base)
    await write_status(app, view, status)
    return wake


def observe(view: ResourceView, caches: Caches) -> Seen:
    """From the caches alone. Children of a former server of the same name are not ours."""
    server, refusal = read_server(view)
    jobs = [job for job in caches.jobs.owned(view.key) if job.labels.get(LABEL_SERVER_UID) == view.uid]
    pods = [pod for pod in caches.pods.owned(view.key) if pod.labels.get(LABEL_SERVER_UID) == view.uid]
    base = parse_uri(server.spec.model.uri)
    claims = dict.fromkeys([server.store_claim, *([base.authority] if base.scheme == "pvc" else [])])
    found = {name: caches.claims.get(view.namespace, name) for name in claims}
    return Seen(
        server=replace(server, held=tuple(name for name, claim in found.items() if claim is not None and claim.one_node)),
        generation=view.generation,
        status=tolerant(ModelServerStatus, view.status),
        refusal=refusal,
        fetch=helper_of(FETCH, jobs, pods, FetchReport),
        pods=tuple(pod for pod in pods if pod.role == SERVER),
        models=tuple(caches.models.owned(view.key)),
        claim_missing=found[server.store_claim] is None,
        nodes=len(caches.nodes) or 1,
        versions=versions_of(view, caches),
    )


def versions_of(view: ResourceView, caches: Caches) -> dict[str, int]:
    """A Deployment's is its generation: its version moves with every pod."""
    found: dict[str, View | None] = {
        DEPLOYMENTS.kind: caches.deployments.get(view.namespace, view.name),
        SERVICES.kind: caches.services.get(view.namespace, view.name),
        CONFIGMAPS.kind: caches.configmaps.get(view.namespace, build_server.adapters_name(view.name)),
    }
    ours = {kind: value for kind, value in found.items() if value and value.labels.get(LABEL_SERVER_UID) == view.uid}
    return {kind: value.generation if isinstance(value, DeploymentView) else value.version for kind, value in ours.items()}


def read_server(view: ResourceView) -> tuple[Server, str]:
    """The server, and why its spec cannot be read: a newer CRD may hold fields that this version does not know."""
    refusal, spec = "", UNREADABLE
    try:
        spec = ModelServerSpec.model_validate(view.spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("spec", *first["loc"]))
        refusal = f"{where}: {first['msg']} (this operator cannot read the spec; is it older than the CRD?)"
    return Server(namespace=view.namespace, name=view.name, uid=view.uid, spec=spec), refusal


Found = tuple[Serving, float, Base | None]
"""What models may know, seconds to the next look, and the base model when this pass learnt where it is."""


async def converge(app: App, view: ResourceView, seen: Seen) -> Found:
    server = seen.server
    if seen.refusal:
        return waiting(seen, Reason.CONFIG_INVALID, seen.refusal), FETCH_AGAIN, None
    if server.held and server.replicas > 1 and seen.nodes > 1:
        message = (
            f"PersistentVolumeClaim {server.held[0]} can be mounted on one node only (ReadWriteOnce) and spec.replicas "
            f"is {server.replicas}; use a ReadWriteMany claim or one replica"
        )
        return waiting(seen, Reason.CONFIG_INVALID, message), FETCH_AGAIN, None
    if seen.base is None:
        return await fetch(app, view, seen)
    if seen.fetch is not None:
        # Status holds its report; a finished pod would only be in people's way.
        await app.delete(JOBS, seen.fetch.job)
    return await serve(app, seen, seen.base)


# The base model


async def fetch(app: App, view: ResourceView, seen: Seen) -> Found:
    server, helper = seen.server, seen.fetch
    if helper is None:
        if await app.live(MODELSERVERS, view) is None:
            return waiting(seen, Reason.FETCHING_MODEL, "being deleted"), CALM, None
        if seen.claim_missing:
            # Its pods depend on what the claim allows, so they come with the next look.
            await app.create(build.store_claim(server, app.settings))
            return waiting(seen, Reason.FETCHING_MODEL, f"making the store {server.store_claim}"), 0.0, None
        for body in (build_server.fetch_configmap(server), build_server.fetch_job(server, app.settings)):
            await refuse_foreign(app, server, *(await app.create(body)))
        return waiting(seen, Reason.FETCHING_MODEL, f"fetching {server.spec.model.uri}"), CALM, None
    report = helper.report
    if isinstance(report, FetchReport) and report.outcome == "Done" and report.base is not None:
        found = waiting(seen, Reason.FETCHING_MODEL, f"{report.base.uri} is in the store")
        return found, 0.0, report.base
    if not helper.ended:
        because = why(helper, app.now())
        doing = f"fetching {server.spec.model.uri}"
        return waiting(seen, Reason.FETCHING_MODEL, f"{doing}; {because}" if because else doing), CALM, None
    return await fetch_again(app, seen, helper)


async def fetch_again(app: App, seen: Seen, helper: Helper) -> Found:
    """Whatever was wrong may have been put right outside of us: a Secret, a file, a quota."""
    message = f"the base model could not be fetched: {helper.failure.sentence}; tried again every minute"
    ended = max((pod.ended_at for pod in app.caches.pods if pod.owner_uid == helper.job.uid and pod.ended_at), default=None)
    due = app.now() if ended is None else ended + timedelta(seconds=FETCH_AGAIN)
    left = (due - app.now()).total_seconds()
    if left <= 0:
        await app.delete(JOBS, helper.job)
        left = SOON
    return waiting(seen, helper.failure.reason, message), left, None


async def refuse_foreign(app: App, server: Server, found: Object | None, made: bool) -> None:
    """Raises ApiError where the name is taken: by what a former server of this name left, which goes, or by another's."""
    if found is None or made:
        return
    labels = found["metadata"].get("labels") or {}
    if labels.get(LABEL_SERVER_UID) == server.uid:
        return
    kind, name = found["kind"], found["metadata"]["name"]
    if LABEL_SERVER_UID not in labels:
        raise ApiError(422, "Conflict", f"there is a {kind} {name} of another owner; give the ModelServer another name")
    await app.kube.delete(RESOURCES[kind], server.namespace, name, uid=found["metadata"]["uid"])
    raise ApiError(409, "Conflict", f"{kind} {name} is of a former server of this name; it goes first")


# What serves it


async def serve(app: App, seen: Seen, base: BasePlace) -> Found:
    server, digest = seen.server, seen.status.base_digest or ""
    serving = Serving(asks=asks_of(server, digest, seen.models))
    wanted = serving.wanted()
    for body in (
        build_server.adapters_configmap(server, wanted),
        build_server.service(server),
        build_server.deployment(server, base, app.settings),
    ):
        await apply(app, server, body, seen.versions.get(body["kind"]))
    for pod in seen.pods:
        await bump(app, pod, wanted.digest())
    replicas = await ask_agents(app, seen.ready_pods)
    serving = replace(serving, replicas=replicas, waits=_why_not(seen))
    return serving, SOON if unsettled(seen, serving) else CALM, None


async def apply(app: App, server: Server, body: Object, version: int | None) -> None:
    """Writes only what differs from what this process applied last, or is not any more what that made, and never over what
    is another's. `version`: of what is there; None: nothing of ours."""
    key, kind, name = (server.uid, body["kind"]), body["kind"], body["metadata"]["name"]
    digest = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    if version is not None and app.applied.get(key) == (digest, version):
        return
    if version is None or key not in app.applied:
        await refuse_foreign(app, server, await app.kube.get(RESOURCES[kind], server.namespace, name), False)
    metadata = (await app.apply(body))["metadata"]
    app.applied[key] = digest, int(metadata["generation" if kind == DEPLOYMENTS.kind else "resourceVersion"])


async def bump(app: App, pod: PodView, digest: str) -> None:
    if pod.deleting_since is not None or pod.annotations.get(ANNOTATION_WANTED) == digest:
        return
    try:
        await app.apply(build_server.pod_bump(pod.namespace, pod.name, pod.uid, digest))
    except ApiError as error:
        if error.status not in (404, 409):
            raise


async def ask_agents(app: App, pods: Sequence[PodView]) -> tuple[Replica, ...]:
    return tuple(await asyncio.gather(*(ask_agent(app, pod) for pod in pods)))


async def ask_agent(app: App, pod: PodView) -> Replica:
    try:
        answer = await app.pull(pod.ip, AGENT_PORT, "/adapters")
        return Replica(pod=pod.name, report=tolerant(AgentReport, json.loads(answer)))
    except (*PULL_ERRORS, ValueError) as error:
        logger.debug("no report from %s/%s: %s", pod.namespace, pod.name, error)
        return Replica(pod=pod.name)


def unsettled(seen: Seen, serving: Serving) -> bool:
    if len(seen.ready_pods) < seen.server.replicas:
        return True
    verdicts = [serving.verdict(model) for model in serving.asks]
    return any(verdict is not None and verdict.underway for verdict in verdicts)


def _why_not(seen: Seen) -> Verdict | None:
    if seen.ready_pods:
        return None
    return Verdict(False, Reason.SERVER_NOT_READY, f"ModelServer {seen.server.name}: {_pods_say(seen)}")


def _pods_say(seen: Seen) -> str:
    if seen.server.replicas == 0:
        return "spec.replicas is 0"
    for pod in seen.pods:
        if pod.message or pod.reason:
            return f"no replica is ready; {pod.name}: {pod.message or pod.reason}"
    return "no replica is ready yet"


# What status says


def waiting(seen: Seen, reason: Reason, message: str) -> Serving:
    """The server serves nothing. Its models hear why, each in the same words."""
    told = Verdict(False, reason, message)
    shown = Verdict(False, Reason.SERVER_NOT_READY, f"ModelServer {seen.server.name}: {message}")
    asks = {model.name: shown for model in seen.models if not model.spec.get("archived")}
    return Serving(asks=asks, waits=told)


def status_of(app: App, seen: Seen, serving: Serving, base: Base | None) -> ModelServerStatus:
    ready = len(seen.ready_pods)
    verdicts = [serving.verdict(model) for model in serving.asks]
    truth = _truth(seen, serving)
    message = truth[2][:MAX_MESSAGE]
    update: dict[str, Any] = {
        "observed_generation": seen.generation,
        "conditions": [
            make_condition(ConditionType.READY, truth, seen.status.conditions or [], seen.generation, app.now()),
        ],
        "replicas": len([pod for pod in seen.pods if pod.deleting_since is None]),
        "ready_replicas": ready,
        "adapters": len(serving.asks),
        "ready_adapters": sum(1 for verdict in verdicts if verdict is not None and verdict.ready),
        "address": seen.server.address if seen.base is not None else None,
        "message": message,
    }
    if base is not None:
        update |= {
            "base_digest": base.digest,
            "base_uri": base.uri,
            "base_claim": base.claim,
            "base_path": base.sub_path,
        }
    return seen.status.model_copy(update=update)


def _truth(seen: Seen, serving: Serving) -> tuple[bool, Reason, str]:
    ready = len(seen.ready_pods)
    if serving.waits is not None and serving.waits.reason != Reason.SERVER_NOT_READY:
        # Replicas that serve go on, whatever keeps the next version of them from coming.
        return ready > 0 and seen.base is not None, serving.waits.reason, serving.waits.message
    if ready == 0:
        return False, Reason.UNAVAILABLE, _pods_say(seen)
    return True, Reason.AVAILABLE, f"{ready} of {seen.server.replicas} replicas answer at {seen.server.address}"


async def write_status(app: App, view: ResourceView, status: ModelServerStatus) -> None:
    """One write at most, and an event when Ready's reason changes."""
    before = [found["reason"] for found in view.status.get("conditions") or () if found["type"] == "Ready"]
    if not await app.patch_status(MODELSERVERS, view, status.to_json()):
        return
    (condition,) = status.conditions or []
    if before != [condition.reason]:
        logger.info("%s/%s: %s: %s", view.namespace, view.name, condition.reason, condition.message)
        reason = Reason(condition.reason)
        await post_event(app.kube, view, reason=reason, message=condition.message, now=app.now())


def _tell_models(app: App, server: ObjectKey, serving: Serving | None) -> None:
    """Asks for a pass of its models when what they are told changes."""
    if app.serving.get(server) == serving:
        return
    if serving is None:
        del app.serving[server]
    else:
        app.serving[server] = serving
    for model in app.caches.models.owned(server):
        app.queue.add(Key(FINETUNEDMODELS.kind, *model.key))
