"""FineTunedModel: one pass. Whether it is Ready is read from what its server's last pass found; nothing is asked here."""

from __future__ import annotations

import logging

from tuneward_api.conditions import ConditionType, Reason
from tuneward_api.finetunedmodel import FineTunedModelStatus
from tuneward_api.names import LABEL_SERVER, MAX_MESSAGE
from tuneward_operator.app import App
from tuneward_operator.events import post_event
from tuneward_operator.kube import FINETUNEDMODELS
from tuneward_operator.queue import Key
from tuneward_operator.served import Serving, Verdict
from tuneward_operator.status import make_condition
from tuneward_operator.tolerant import tolerant
from tuneward_operator.views import ResourceView

logger = logging.getLogger(__name__)


async def reconcile(app: App, key: Key) -> float | None:
    view = app.caches.models.get(key.namespace, key.name)
    if view is None or view.deleting_since is not None:
        app.queue.forget(key)
        return None
    server = view.owner if LABEL_SERVER in view.labels else None
    serving = None if server is None else app.serving.get(server)
    exists = server is not None and app.caches.servers.get(*server) is not None
    verdict = decide(view, server_exists=exists, serving=serving)
    if verdict is None:
        if view.status:
            # After a restart of the operator the server's pass comes first; until then what was said stays said.
            return None
        verdict = Verdict(False, Reason.LOADING, f"ModelServer {view.labels[LABEL_SERVER]} has not looked at it yet")
    await write_status(app, view, status_of(app, view, verdict, serving))
    return None


def decide(view: ResourceView, *, server_exists: bool, serving: Serving | None) -> Verdict | None:
    """None: it is for the server's next pass to say, which asks for a pass of its models."""
    server = view.labels.get(LABEL_SERVER)
    if view.spec.get("archived"):
        return Verdict(False, Reason.ARCHIVED, "spec.archived is true: no server offers it; its files are kept")
    if not server:
        return Verdict(True, Reason.VERIFIED, f"its files were verified; {_unserved(view)}")
    if not server_exists:
        message = f"there is no ModelServer {server} in this namespace; make it, or change the label {LABEL_SERVER}"
        return Verdict(False, Reason.SERVER_MISSING, message)
    return None if serving is None else serving.verdict(view.name)


def _unserved(view: ResourceView) -> str:
    artifact = view.spec.get("artifact")
    if view.spec.get("adapter") is None and artifact:
        return f"it is a base model of its own: make a ModelServer whose spec.model.uri is {artifact.get('uri')}/model"
    return "no ModelServer is asked to serve it"


def status_of(app: App, view: ResourceView, verdict: Verdict, serving: Serving | None) -> FineTunedModelStatus:
    before = tolerant(FineTunedModelStatus, view.status)
    message = verdict.message[:MAX_MESSAGE]
    return FineTunedModelStatus(
        conditions=[make_condition(ConditionType.READY, verdict, before.conditions or [], view.generation, app.now())],
        observed_generation=view.generation,
        server=view.labels.get(LABEL_SERVER),
        replicas=(serving.proofs(view.name) if serving is not None else []) or None,
        message=message,
    )


async def write_status(app: App, view: ResourceView, status: FineTunedModelStatus) -> None:
    """One write at most, and an event when Ready's reason changes."""
    before = [found["reason"] for found in view.status.get("conditions") or () if found["type"] == "Ready"]
    if not await app.patch_status(FINETUNEDMODELS, view, status.to_json()):
        return
    (condition,) = status.conditions or []
    if before != [condition.reason]:
        logger.info("%s/%s: %s: %s", view.namespace, view.name, condition.reason, condition.message)
        await post_event(app.kube, view, reason=Reason(condition.reason), message=condition.message, now=app.now())
