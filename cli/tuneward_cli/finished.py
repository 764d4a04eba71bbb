"""The models that `tuneward train` left in a store: what FineTunedModels are in a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.files import FinishedAdapter, FinishReport, Parent, Plan


@dataclass(frozen=True)
class Finished:
    """A job of the store that ended in an adapter, or in a model that was trained whole."""

    plan: Plan
    adapter: FinishedAdapter

    @property
    def name(self) -> str:
        """As its FineTunedModel would be called."""
        request = self.plan.request
        registered = request.spec.register_.name if request.spec.register_ is not None else None
        return names.model_name(registered or request.job.name, self.adapter.digest)

    def as_parent(self, store_claim: str) -> Parent:
        """For a job that goes on from it and calls the store `store_claim`."""
        base = self.plan.prepared.base
        return Parent(
            name=self.name,
            base_uri=base.uri,
            base_digest=base.digest,
            artifact_uri=f"pvc://{store_claim}/{self.adapter.sub_path}",
            artifact_digest=self.adapter.digest,
            whole=self.adapter.whole or None,
        )


def finished(store: Path) -> list[Finished]:
    """Newest last."""
    reports = sorted(store.glob("jobs/*/finish/report.json"), key=lambda file: file.stat().st_mtime)
    found = []
    for file in reports:
        try:
            report = FinishReport.model_validate_json(file.read_bytes())
            plan = Plan.model_validate_json((file.parents[1] / "plan.json").read_bytes())
        except (OSError, ValidationError):
            continue
        if report.adapter is not None:
            found.append(Finished(plan, report.adapter))
    return found
