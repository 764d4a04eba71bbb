"""Kubernetes Events on our resources, so that `kubectl describe` tells the story of a job."""

from __future__ import annotations

import logging
import secrets
from datetime import datetime

from tuneward_api.conditions import Reason
from tuneward_api.names import MAX_MESSAGE
from tuneward_operator.kube import ApiError, Kube
from tuneward_operator.views import ResourceView

logger = logging.getLogger(__name__)

COMPONENT = "tuneward-operator"


def event_body(about: ResourceView, *, reason: str, message: str, warning: bool, now: datetime) -> dict[str, object]:
    """A core/v1 Event; `kubectl describe` reads no other."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": about.namespace, "name": f"{about.name}.{secrets.token_hex(8)}"},
        "involvedObject": {
            "apiVersion": about.body["apiVersion"],
            "kind": about.body["kind"],
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
            "resourceVersion": str(about.version),
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message[:MAX_MESSAGE],
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


async def post_event(
    kube: Kube, about: ResourceView, *, reason: Reason, message: str, now: datetime, warning: bool = False
) -> None:
    """An event that cannot be posted costs a log line, never a pass."""
    try:
        await kube.create(event_body(about, reason=reason, message=message, warning=warning, now=now))
    except ApiError as error:
        logger.warning("event on %s/%s: %s", about.namespace, about.name, error)
