"""Pictures of a job for the pure tests: what `observe` would give, without any cluster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.operator.world import finish_report, prepare_report

from tuneward_api.failures import classify
from tuneward_api.files import FinishReport, Images, JobRef, Plan, PrepareReport, Progress, Request, Result
from tuneward_api.finetunejob import FineTuneJobSpec, FineTuneJobStatus
from tuneward_operator.build import Owner
from tuneward_operator.observe import Gang, Helper, Outcome, Seen, Worker
from tuneward_operator.poll import Heard
from tuneward_operator.settings import Settings
from tuneward_operator.status import resolved_of
from tuneward_operator.views import JobView

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
UID = "0c0ffee0-0000-4000-8000-000000000000"
SETTINGS = Settings(image_trainer="trainer:1", retry_seconds=5)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def owner(*, labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None, **spec: Any) -> Owner:
    whole = {
        "model": {"uri": "pvc://tuneward-store/imports/tiny"},
        "datasets": {"training": [{"uri": "configmap://chats/chats.jsonl"}]},
        "workers": {"gpusPerWorker": 0},
        **spec,
    }
    return Owner(
        namespace="team",
        name="bot",
        uid=UID,
        spec=FineTuneJobSpec.model_validate(whole),
        labels=labels or {},
        annotations=annotations or {},
    )


def plan(of: Owner) -> Plan:
    request = Request(
        job=JobRef(namespace=of.namespace, name=of.name, uid=of.uid),
        spec=of.spec,
        images=Images(trainer="trainer:1"),
        store_claim="tuneward-store",
        run_directory=f"jobs/{of.name}-{of.uid[:8]}",
    )
    prepared = PrepareReport.model_validate(prepare_report()).prepared
    assert prepared is not None
    return Plan(request=request, prepared=prepared)


def job(role: str, launch: int = 0, **more: Any) -> JobView:
    name = f"bot-a{launch}" if launch else f"bot-{role}"
    labels = {"tuneward.dev/role": role, "tuneward.dev/job": "bot"}
    if launch:
        labels["tuneward.dev/launch"] = str(launch)
    values: dict[str, Any] = {
        "namespace": "team",
        "name": name,
        "uid": f"uid-{name}",
        "version": 1,
        "labels": labels,
        "created_at": ago(60),
        "deleting_since": None,
        "suspended": False,
        "started_at": ago(60),
        "conditions": {},
    }
    return JobView(**(values | more))


def worker(index: int = 0, launch: int = 1, phase: str = "Running", **more: Any) -> Worker:
    values: dict[str, Any] = {
        "pod": f"bot-a{launch}-{index}-x",
        "uid": f"pod-{launch}-{index}",
        "index": index,
        "node": "n1",
        "ip": "10.0.0.1",
        "launch": launch,
        "phase": phase,
        "deleting": False,
        "lost": False,
        "started_at": ago(50),
        "exit_code": None,
        "reason": "",
        "message": "",
        "disruption": "",
    }
    return Worker(**(values | more))


def gang(*workers: Worker, launch: int = 1, outcome: Outcome = "Running", **more: Any) -> Gang:
    view = job("attempt", launch, **more)
    return Gang(
        job=view,
        launch=launch,
        outcome=outcome,
        suspended=view.suspended,
        workers=workers,
    )


def helper(role: str, report: PrepareReport | FinishReport | None = None, *, ended: bool = True, **more: Any) -> Helper:
    return Helper(
        job=job(role),
        ended=ended,
        report=report,
        failure=more.get("failure", classify(exit_code=None)),
        waits_for=more.get("waits_for", ""),
        pod_phase=more.get("pod_phase", ""),
    )


def prepared() -> Helper:
    return helper("prepare", PrepareReport.model_validate(prepare_report()))


def finished() -> Helper:
    return helper("finish", FinishReport.model_validate(finish_report()))


def seen(of: Owner | None = None, **more: Any) -> Seen:
    return Seen(owner=of or owner(), generation=1, status=more.pop("status", FineTuneJobStatus()), **more)


def accepted(of: Owner | None = None, *, status: dict[str, Any] | None = None, **more: Any) -> Seen:
    """Prepared, with its plan at hand."""
    of = of or owner()
    whole = plan(of)
    known = FineTuneJobStatus.model_validate({"acceptedAt": "2026-11-25T11:00:00Z", **(status or {})})
    known = known.model_copy(update={"resolved": resolved_of(whole)})
    picture = seen(of, status=known, plan=whole, plan_sought=True, prepare=prepared(), **more)
    found = picture.gang
    if found is not None and not picture.workers:
        picture = replace(picture, workers=found.workers, attempts=(found.job,))
    return picture


def heard(at: datetime = NOW, *, still: float = 0, **progress: Any) -> Heard:
    """`still`: seconds without a step."""
    said = Progress.model_validate({"attempt": 1, "steps": 100, "phase": "Training", **progress})
    return Heard(said, at, at - timedelta(seconds=still))


def result(attempt: int = 1, *, outcome: str = "Succeeded", **more: Any) -> Result:
    values = {
        "attempt": attempt,
        "podUID": "pod-1-0",
        "planDigest": "x",
        "outcome": outcome,
        "exitCode": 0,
        "reason": "Succeeded",
        "message": "",
        "step": 100,
        "steps": 100,
        "finishedAt": "2026-11-25T12:00:00Z",
    }
    return Result.model_validate(values | more)
