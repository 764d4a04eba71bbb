"""`tuneward watch` and `tuneward logs`: a job as its status tells it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from tuneward_api.conditions import FINAL_PHASES, Phase, Reason
from tuneward_api.names import LABEL_JOB, ExitCode
from tuneward_cli.errors import CommandError
from tuneward_cli.kube import JOBS, PODS, Json, Kube
from tuneward_cli.voice import Voice
from tuneward_cli.words import Seen, condition, job_line, losses_line, phase_line

_LOOK_EVERY: Final = 0.5

_CODES: Final = {
    Reason.DATA_INVALID: ExitCode.DATA_BAD,
    Reason.INPUT_MISSING: ExitCode.INPUT_MISSING,
    Reason.CONFIG_INVALID: ExitCode.CONFIG_BAD,
    Reason.MODEL_UNSUPPORTED: ExitCode.CONFIG_BAD,
    Reason.STORE_NOT_WRITABLE: ExitCode.CONFIG_BAD,
}


def the_job(kube: Kube, name: str) -> Json:
    found = kube.get(JOBS, name)
    if found is None:
        known = ", ".join(item["metadata"]["name"] for item in kube.list(JOBS)) or "none"
        raise CommandError(
            f"no FineTuneJob {name} in namespace {kube.namespace}; there are: {known}", paste="kubectl get ftj -A"
        )
    return found


def follow(kube: Kube, name: str, voice: Voice) -> Json:
    """Shows phases and steps until the job has ended; the job as it is then."""
    with voice.bar(name) as bar:
        while True:
            job = the_job(kube, name)
            status = job.get("status") or {}
            bar.phase(status.get("phase") or Phase.PENDING, job_line(job))
            bar.update(Seen.of(status.get("progress")))
            if status.get("phase") in FINAL_PHASES:
                return job
            time.sleep(_LOOK_EVERY)


def verdict(job: Mapping[str, Any]) -> None:
    """Raises CommandError for a job that did not end in a model."""
    status = job.get("status") or {}
    if status.get("phase") == Phase.SUCCEEDED:
        return
    name, reason = (
        job["metadata"]["name"],
        str(condition(job, "Failed").get("reason") or condition(job, "Finished").get("reason")),
    )
    code = next((value for known, value in _CODES.items() if known == reason), 1)
    raise CommandError(
        f"{phase_line(name, status.get('phase'))}: {reason}: {status.get('message', '')}",
        paste=f"kubectl describe ftj {name}; tuneward logs {name}",
        code=code,
    )


def watch(kube: Kube, name: str, voice: Voice) -> int:
    job = follow(kube, name, voice)
    verdict(job)
    model = job["status"].get("model") or {}
    before, after = model.get("validationLossBefore"), model.get("validationLossAfter")
    voice.done(f"{name} ended in {model.get('servedName')}")
    voice.line(f"  {losses_line(before, after, (job['status'].get('progress') or {}).get('trainLoss'))}")
    voice.line("next: tuneward chat" if job["spec"].get("serve") else f"next: kubectl describe ftm {model.get('name')}")
    voice.result({"job": name, "phase": job["status"]["phase"], "model": model})
    return 0


def logs(kube: Kube, name: str, *, worker: int, follow: bool) -> int:
    """The log of the job's newest pod: the worker's once there is one, else prepare's; finish's when that is newest."""
    the_job(kube, name)
    pod = newest_pod(kube.list(PODS, f"{LABEL_JOB}={name}"), worker)
    if pod is None:
        raise CommandError(
            f"the job {name} has no pods (finished jobs keep theirs for a day)", paste=f"kubectl describe ftj {name}"
        )
    sys.stderr.write(f"# pod {pod['metadata']['name']}\n")
    query = {"follow": "true"} if follow else {}
    for line in kube.lines(PODS.path(kube.namespace, pod["metadata"]["name"], "log"), query):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


def newest_pod(pods: list[Json], worker: int) -> Json | None:
    """Of the pods that have started: workers of other indexes are left out."""
    index = "batch.kubernetes.io/job-completion-index"
    wanted = [
        pod
        for pod in pods
        if pod["status"].get("phase") != "Pending" and pod["metadata"]["labels"].get(index) in (None, str(worker))
    ]
    workers = [pod for pod in wanted if index in pod["metadata"]["labels"]]
    return max(workers or wanted, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)
