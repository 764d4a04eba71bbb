"""FineTuneJob: one pass. Reads top to bottom; what to do is `decide`'s, how it looks is `build`'s."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from tuneward_api.conditions import FINAL_PHASES, Phase, Reason
from tuneward_api.files import Plan, PrepareReport, Request
from tuneward_api.names import LABEL_JOB_UID, LABEL_SERVER
from tuneward_operator import build, inputs
from tuneward_operator import status as texts
from tuneward_operator.app import App
from tuneward_operator.decide import decide
from tuneward_operator.decision import Decision, Step
from tuneward_operator.events import post_event
from tuneward_operator.kube import CONFIGMAPS, FINETUNEDMODELS, FINETUNEJOBS, JOBS, RESOURCES, ApiError, Object
from tuneward_operator.observe import Seen, observe
from tuneward_operator.poll import Leader
from tuneward_operator.queue import Key
from tuneward_operator.status import Say
from tuneward_operator.tolerant import parse
from tuneward_operator.views import ResourceView

logger = logging.getLogger(__name__)

REFUSED_SECONDS = 30.0


async def reconcile(app: App, key: Key) -> float | None:
    view = app.caches.finetunejobs.get(key.namespace, key.name)
    if view is None or view.deleting_since is not None:
        # Children follow their owner without us.
        app.queue.forget(key)
        return None
    now = app.now()
    seen = observe(view, app.caches, app.board, now)
    decision = decide(seen, now, app.settings)
    if decision.needs_plan:
        seen = replace(seen, plan=await find_plan(app, seen), plan_sought=True)
        decision = decide(seen, now, app.settings)
    if decision.step == Step.PREPARE:
        seen = replace(seen, input_problem=await missing_configmap(app, seen))
        decision = decide(seen, now, app.settings)
    try:
        if not await ensure(app, view, seen, decision):
            return 0
    except ApiError as error:
        if not error.refused:
            raise
        decision = _refused(app, seen, error)
    if not await write_status(app, view, decision):
        return None
    over = decision.wake is None and decision.status.phase in FINAL_PHASES
    return None if over else app.settings.resync_seconds if decision.wake is None else decision.wake


def leaders(app: App) -> Iterator[Leader]:
    """Whose progress is worth asking for."""
    for pod in app.caches.pods:
        if pod.role == build.ATTEMPT and pod.index == 0 and pod.phase == "Running" and pod.ip and pod.owner is not None:
            yield Leader(pod.namespace, pod.owner.name, pod.name, pod.uid, pod.ip)


async def ensure(app: App, view: ResourceView, seen: Seen, decision: Decision) -> bool:
    """Makes and deletes what was decided. False: the picture was old, nothing was done; decide again."""
    for job in decision.delete:
        await app.delete(JOBS, job)
    owner, plan, settings = seen.owner, seen.plan, app.settings
    if decision.step in (Step.PREPARE, Step.LAUNCH):
        # The watch may have missed a deletion or lag behind a suspension: nothing starts on an old word.
        live = await app.live(FINETUNEJOBS, view)
        if live is None or live.generation != view.generation:
            return False
    if decision.step == Step.PREPARE:
        if seen.claim_missing:
            # Its pods depend on what the claim allows, so they come with the next look.
            await app.create(build.store_claim(owner, settings))
            return False
        found = await make(app, build.request_configmap(owner, build.request_of(owner, settings, seen.parent)))
        request = Request.model_validate_json(found["data"]["request.json"])
        await make(app, build.prepare_job(owner, request, settings))
    elif decision.step == Step.LAUNCH and plan is not None:
        await make(app, build.gang_service(owner))
        if settings.network_policy_namespaces:
            await make(app, build.gang_policy(owner, settings))
        await make(app, build.attempt_job(owner, plan, decision.launch, settings))
    elif decision.step == Step.FINISH and plan is not None:
        await make(app, build.finish_job(owner, plan, settings))
    elif decision.step == Step.REGISTER and plan is not None and decision.adapter is not None:
        await register(app, build.finetuned_model(owner, plan, decision.adapter))
    if decision.relabel is not None and seen.status.model is not None:
        labels: dict[str, str | None] = {LABEL_SERVER: decision.relabel or None}
        await app.kube.label(FINETUNEDMODELS, owner.namespace, seen.status.model.name, labels)
    return True


async def make(app: App, body: Object) -> Object:
    """`body`, or what this very job made of it before. What a former job of the same name left is taken away."""
    found, made = await app.create(body)
    kind, name = body["kind"], body["metadata"]["name"]
    if found is None:
        raise ApiError(409, "Conflict", f"{kind} {name} comes and goes")
    labels = found["metadata"].get("labels") or {}
    if not made and labels.get(LABEL_JOB_UID) != body["metadata"]["labels"][LABEL_JOB_UID]:
        namespace, uid = found["metadata"]["namespace"], found["metadata"]["uid"]
        if LABEL_JOB_UID in labels:
            await app.kube.delete(RESOURCES[kind], namespace, name, uid=uid)
        raise ApiError(409, "Conflict", f"{kind} {name} is not this job's; a former job of this name may have left it")
    return found


async def register(app: App, body: Object) -> None:
    """A job that was run again ends in the same bytes, whose record is there already, perhaps without this one's server."""
    found, made = await app.create(body)
    metadata = body["metadata"]
    wanted = metadata["labels"].get(LABEL_SERVER)
    if made or found is None or wanted in (None, (found["metadata"].get("labels") or {}).get(LABEL_SERVER)):
        return
    await app.kube.label(FINETUNEDMODELS, metadata["namespace"], metadata["name"], {LABEL_SERVER: wanted})


async def find_plan(app: App, seen: Seen) -> Plan | None:
    """The plan of this job, made from request and report where it is not there yet; None: it cannot be made."""
    owner = seen.owner
    plan = parse(Plan, await _document(app, seen, "plan"))
    if plan is not None:
        return plan
    report = seen.prepare.report if seen.prepare is not None else None
    request = parse(Request, await _document(app, seen, "request"))
    if request is None or not isinstance(report, PrepareReport) or report.prepared is None:
        return None
    found = await make(app, build.plan_configmap(owner, Plan(request=request, prepared=report.prepared)))
    return parse(Plan, found["data"]["plan.json"])


async def missing_configmap(app: App, seen: Seen) -> str:
    """A sentence about the first that the data is in and that is not there; empty: all are. They are too many to watch."""
    for name, field in inputs.configmaps(inputs.inputs_of(seen.owner.spec, seen.parent)).items():
        if await app.kube.get(CONFIGMAPS, seen.owner.namespace, name) is None:
            return inputs.missing("ConfigMap", name, field)
    return ""


async def _document(app: App, seen: Seen, document: str) -> str:
    found = await app.kube.get(CONFIGMAPS, seen.owner.namespace, build.document_name(seen.owner.name, document))
    if found is None or (found["metadata"].get("labels") or {}).get(LABEL_JOB_UID) != seen.owner.uid:
        return ""
    return str(found["data"].get(f"{document}.json", ""))


def _refused(app: App, seen: Seen, error: ApiError) -> Decision:
    """The API server will not have our object: quota, policy, or a name in the spec. People must read why."""
    phase = seen.status.phase or Phase.PENDING
    message = f"the API server refused an object of this job: {error.message}"
    say = Say(phase=phase, reason=Reason.OBJECT_REFUSED, message=message, at_rest=False, stalled=True)
    status = texts.conclude(seen, seen.status, say, app.now())
    return Decision(status=status, reason=Reason.OBJECT_REFUSED, wake=REFUSED_SECONDS)


async def write_status(app: App, view: ResourceView, decision: Decision) -> bool:
    """One write at most, and the news of a new phase. False: the job is gone."""
    before, after = view.status.get("phase"), decision.status.phase
    if not await app.patch_status(FINETUNEJOBS, view, decision.status.to_json()):
        return False
    if after is not None and after != before:
        message = decision.status.message or ""
        app.metrics.phases.labels(str(after)).inc()
        about = {"namespace": view.namespace, "name_": view.name, "phase": str(after), "reason": str(decision.reason)}
        logger.info("%s/%s is %s: %s", view.namespace, view.name, after, message, extra=about)
        warning = after in (Phase.FAILED, Phase.RECOVERING)
        await post_event(app.kube, view, reason=decision.reason, message=message, now=app.now(), warning=warning)
    return True
