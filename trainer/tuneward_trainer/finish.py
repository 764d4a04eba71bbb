"""After the training: check the adapter, or the model that was trained whole, hold it against the gate, file it under its
digest, report.

Quick and idempotent: the folder's name is its digest, and everything in the report comes from files, so that a second
pass, after a report that got lost, says the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from tuneward_api import manifest, names
from tuneward_api.adapters import targets_of
from tuneward_api.conditions import Reason
from tuneward_api.evaluation import Gate
from tuneward_api.files import FinishedAdapter, FinishReport, Metrics, Plan, Result
from tuneward_api.names import MAX_MESSAGE, ExitCode
from tuneward_trainer import report, rundir
from tuneward_trainer.store import alone

FOLDER: Final = "finish"


def main(plan_path: Path) -> int:
    """Reports by termination message and finish/report.json; returns the exit code."""
    report.start_logging()
    store = rundir.directory(names.ENV_STORE_DIR)
    made, failure = report.ending(lambda: finish(rundir.load_plan(plan_path), store))
    folder = None
    if plan_path.is_file() and failure is None:
        folder = store / rundir.load_plan(plan_path).request.run_directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
    if failure is not None:
        made = FinishReport(outcome="Failed", reason=failure.reason, message=failure.message)
        return report.emit(made, folder, code=failure.code)
    assert made is not None
    return report.emit(made, folder, code=ExitCode.OK)


def finish(plan: Plan, store: Path) -> FinishReport:
    """The report of a training that succeeded. Raises EndError."""
    run = store / plan.request.run_directory
    result = succeeded(plan, run)
    source = run / str(result.adapter_directory)
    try:
        digest = manifest.verify(source, digest=result.adapter_digest)
    except manifest.ManifestError as error:
        what = f"the trained {_noun(plan)} is not what the trainer left: {error}"
        raise report.input_missing(f"{what}; something else wrote to the store: train again in a new FineTuneJob") from error
    evaluation = plan.request.spec.evaluation
    refusal = refused(evaluation.gate if evaluation is not None else None, result.metrics)
    if refusal is not None:
        message = f"{refusal}; the {_noun(plan)} stays in {plan.request.run_directory}/{result.adapter_directory}"
        return FinishReport(
            outcome="Failed", reason=Reason.GATE_REFUSED, message=message[:MAX_MESSAGE], metrics=result.metrics
        )
    whole = plan.prepared.method.type == "Full"
    sub_path = names.whole_model_directory(digest) if whole else names.adapter_directory(digest)
    file_under(source, store / sub_path, digest)
    adapter = describe(plan, result, store / sub_path, sub_path, digest)
    return FinishReport(
        outcome="Done",
        reason=Reason.SUCCEEDED,
        message=f"{adapter.served_name} is ready to be served" + (" as a base model of its own" if whole else ""),
        adapter=adapter,
        metrics=result.metrics,
    )


def _noun(plan: Plan) -> str:
    return "model" if plan.prepared.method.type == "Full" else "adapter"


def succeeded(plan: Plan, run: Path) -> Result:
    found = rundir.terminal_result(run, plan.digest())
    if found is None or found.outcome != "Succeeded" or found.adapter_directory is None:
        raise report.input_missing(f"{run} holds no successful result of this plan; train first")
    return found


def refused(gate: Gate | None, metrics: Metrics) -> str | None:
    """All that the gate refuses, each with both figures, or None."""
    if gate is None:
        return None
    return "; ".join(filter(None, (_loss_refused(gate, metrics), _score_refused(gate, metrics)))) or None


def _loss_refused(gate: Gate, metrics: Metrics) -> str | None:
    before, after = metrics.validation_loss_before, metrics.validation_loss_after
    if gate.max_loss is None and gate.min_improvement is None:
        return None
    if before is None or after is None:
        return "the gate needs a validation loss, and none was measured: the validation samples hold no target token"
    improvement = (before - after) / before if before else 0.0
    missed = []
    if gate.max_loss is not None and after > gate.max_loss:
        missed.append(f"evaluation.gate.maxLoss is {gate.max_loss:g}")
    if gate.min_improvement is not None and improvement < gate.min_improvement:
        missed.append(f"evaluation.gate.minImprovement is {gate.min_improvement:.1%}")
    if not missed:
        return None
    change = f"{'better' if improvement >= 0 else 'worse'} by {abs(improvement):.1%}"
    return "; ".join([f"the validation loss is {after:.4f}, {before:.4f} before, {change}", *missed])


def _score_refused(gate: Gate, metrics: Metrics) -> str | None:
    before, after = metrics.task_score_before, metrics.task_score_after
    if gate.min_score is None:
        return None
    if after is None:
        return "the gate needs a task score, and none was measured: no validation sample has a prompt and an answer"
    if after < gate.min_score:
        base = f", the base model's {before:.1%}" if before is not None else ""
        return f"the task score is {after:.1%}{base}; evaluation.gate.minScore is {gate.min_score:.1%}"
    return None


def file_under(source: Path, target: Path, digest: str) -> None:
    """Copies `source` to its place for good, the manifest last; what is complete there already stays."""
    if filed(target, digest):
        return
    # A finish on a node that was given up may still be at it, and two jobs may end in the same bytes: whoever comes second
    # must not write over what is being served.
    with alone(target):
        if not filed(target, digest):
            _copy(source, target, digest)


def filed(folder: Path, digest: str) -> bool:
    """Whether every byte is there; reads them all."""
    try:
        manifest.verify(folder, digest=digest)
    except manifest.ManifestError:
        return False
    return True


def _copy(source: Path, target: Path, digest: str) -> None:
    # What is there was cut short by a kill, or changed.
    (target / manifest.MANIFEST).unlink(missing_ok=True)
    for path in manifest.list_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
    copied = manifest.write_manifest(target)
    if copied != digest:
        raise report.try_again(f"the copy has digest {copied}, expected {digest}")


def shape_of(plan: Plan, folder: Path) -> dict[str, Any]:
    """Of the adapter in `folder`; a whole model has none."""
    if plan.prepared.method.type == "Full":
        return {"type": "Full"}
    config: dict[str, Any] = json.loads((folder / "adapter/adapter_config.json").read_text())
    return {
        "type": "DoRA" if config.get("use_dora") else "LoRA",
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "target_modules": targets_of(config),
    }


def describe(plan: Plan, result: Result, folder: Path, sub_path: str, digest: str) -> FinishedAdapter:
    """As FineTunedModel's spec will have it. Its date is the training's, so that a second pass makes the same name."""
    register = plan.request.spec.register_
    suffix = (register.suffix if register is not None else None) or plan.request.job.name
    return FinishedAdapter(
        sub_path=sub_path,
        digest=digest,
        size=sum(entry.size for entry in manifest.read_manifest(folder)[1]),
        **shape_of(plan, folder),
        served_name=names.served_name(plan.prepared.base.uri, suffix, result.finished_at[:10].replace("-", ""), digest),
        attempt=result.attempt,
        step=result.step,
        metrics=result.metrics,
    )
