"""Why a pod does not start, in the words of the scheduler or the kubelet, and what to change. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

from tuneward_api.conditions import FailureClass, Reason
from tuneward_api.failures import Failure
from tuneward_api.finetunejob import RunPolicy
from tuneward_operator.observe import Helper
from tuneward_operator.views import JobView

DEFAULT_START_SECONDS: Final = 1800
NO_POD_SECONDS: Final = 10.0
"""The Job controller makes a pod within a second, or says on the Job why it may not."""

_NO_GPU: Final = r"Insufficient \S+/\S+"
_GPUS: Final = "lower spec.workers.gpusPerWorker (0 trains on CPUs), or add nodes that have as many"
_ROOM: Final = "make room on a node, or ask for less in {resources}"
_REMEDIES: Final = (
    (_NO_GPU, _GPUS),
    (r"Insufficient|exceeded quota|Too many pods", _ROOM),
    (r"affinity|selector|taint", "make the nodes fit spec.workers.nodeSelector and tolerations, or change these"),
    (r"[Pp]ersistent[Vv]olume|volume", "look at the claim with `kubectl describe pvc`"),
    (r"image|registry", "check the image's name and its pull Secret (images of the chart)"),
    (r"not found|couldn't find key", "create what it misses"),
)


def start_seconds(policy: RunPolicy) -> int:
    return policy.start_timeout_seconds or DEFAULT_START_SECONDS


def start_left(job: JobView, now: datetime, policy: RunPolicy) -> float:
    """Seconds until its pods have taken too long; counted from its admission."""
    began = job.started_at or job.created_at or now
    return (began + timedelta(seconds=start_seconds(policy)) - now).total_seconds()


def too_late(what: str, why: str, policy: RunPolicy, *, resources: str) -> Failure:
    """`resources`: the field or setting with what its pods ask for."""
    return Failure(
        failure_class=FailureClass.INFRASTRUCTURE,
        reason=Reason.START_TIMEOUT,
        sentence=f"{what} did not start within {start_seconds(policy)} s ({why}); {remedy(why, resources)}",
    )


def remedy(why: str, resources: str) -> str:
    advice = next((advice for pattern, advice in _REMEDIES if re.search(pattern, why)), "`kubectl describe pod` says more")
    return f"{advice.format(resources=resources)}, or raise spec.runPolicy.startTimeoutSeconds"


def hint(why: str) -> str:
    """What to change at once, where waiting seldom helps: one GPU is the default, and a cluster may have none."""
    return f"; {_GPUS}" if re.search(_NO_GPU, why) else ""


def why(helper: Helper, now: datetime) -> str:
    """Empty: it runs, or nothing keeps it from running that would be known yet."""
    if helper.pod_phase == "Pending":
        return f"its pod waits: {helper.waits_for}" if helper.waits_for else ""
    return "" if helper.pod_phase or helper.ended else no_pod(helper.job, now)


def no_pod(job: JobView, now: datetime) -> str:
    """Of a Job without pods. What kept the controller from making them stands in no status, only in the Job's events."""
    if job.suspended:
        return f"Job {job.name} is suspended; something else than Tuneward did it"
    began = job.started_at or job.created_at or now
    if (now - began).total_seconds() < NO_POD_SECONDS:
        return ""
    return f"Job {job.name} has no pod; `kubectl describe job {job.name}` says why"


def next_look(helper: Helper, now: datetime, policy: RunPolicy) -> float | None:
    """Seconds until the clock alone may change what is said of it."""
    if helper.ended or helper.pod_phase not in ("", "Pending") or helper.job.suspended:
        return None
    left = start_left(helper.job, now, policy)
    return left if helper.pod_phase else min(left, NO_POD_SECONDS)


def judged(helper: Helper | None, role: str, now: datetime, policy: RunPolicy) -> Helper | None:
    """With a pod that takes too long to start it has ended, and what keeps the pod is its failure."""
    if helper is None or helper.ended or helper.pod_phase not in ("", "Pending") or helper.job.suspended:
        return helper
    if start_left(helper.job, now, policy) > 0:
        return helper
    reason = helper.waits_for or no_pod(helper.job, now)
    asked = "the operator's TUNEWARD_HELPER_CPU and TUNEWARD_HELPER_MEMORY"
    return helper.over(too_late(f"the {role} pod", reason, policy, resources=asked))
