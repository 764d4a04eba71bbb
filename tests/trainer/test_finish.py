"""From a result to a filed adapter, or to a refusal with both figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.jobs import Job, make_job, reported

from tuneward_api import manifest
from tuneward_api.conditions import Reason
from tuneward_api.evaluation import Gate
from tuneward_api.files import Metrics, Result
from tuneward_trainer import finish, rundir


def ended(job: Job, **changes: Any) -> Result:
    """Leaves a success with an adapter folder as the trainer would."""
    folder = job.run / "adapter/a1"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}')
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (folder / "proof.json").write_text("{}")
    values: dict[str, Any] = {
        "attempt": 1, "pod_uid": "", "plan_digest": job.plan.digest(), "outcome": "Succeeded", "exit_code": 0,
        "reason": Reason.SUCCEEDED, "message": "trained 12 steps", "step": 12, "steps": 12,
        "finished_at": "2026-11-24T23:59:59Z", "adapter_directory": "adapter/a1",
        "adapter_digest": manifest.write_manifest(folder),
        "metrics": Metrics(validation_loss_before=2.0, validation_loss_after=1.5),
    }  # fmt: skip
    return rundir.write_result(job.run, Result(**values | changes))


def test_the_adapter_is_filed_under_its_digest(tmp_path: Path) -> None:
    job = make_job(tmp_path, spec={"register": {"suffix": "lamp"}})
    # The last steps were no better.
    result = ended(job, step=9)
    code, report = reported(job)
    assert (code, report.outcome, report.reason) == (0, "Done", Reason.SUCCEEDED)
    adapter = report.adapter
    assert adapter is not None
    assert (adapter.attempt, adapter.step) == (1, 9)
    assert result.adapter_digest == adapter.digest == manifest.verify(tmp_path / adapter.sub_path)
    assert adapter.sub_path == f"adapters/sha256-{adapter.digest.removeprefix('sha256:')}"
    # The training's date, not today's.
    assert adapter.served_name == f"ft:tiny:lamp:20261124:{adapter.digest[7:15]}"
    assert (adapter.rank, adapter.alpha, adapter.target_modules) == (4, 8.0, ["q_proj", "v_proj"])
    assert (job.run / "finish/report.json").is_file()


def test_a_second_pass_says_the_same(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended(job)
    first = reported(job)
    assert reported(job) == first


def test_a_copy_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended(job)
    _, report = reported(job)
    assert report.adapter is not None
    (tmp_path / report.adapter.sub_path / "adapter/adapter_model.safetensors").write_bytes(b"wei")
    assert reported(job)[1] == report
    manifest.verify(tmp_path / report.adapter.sub_path)


def test_a_finish_that_is_second_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found nothing; the first then filed the adapter, and it may be served already."""
    job = make_job(tmp_path)
    ended(job)
    served: list[int] = []
    copy = finish._copy
    monkeypatch.setattr(finish, "alone", lambda target: first_files_it(job, target, copy, served))
    code, _ = reported(job)
    (file,) = (tmp_path / "adapters").glob("sha256-*/adapter/adapter_model.safetensors")
    assert (code, file.stat().st_mtime_ns) == (0, served[0])


@contextmanager
def first_files_it(job: Job, target: Path, copy: Any, served: list[int]) -> Iterator[None]:
    source = job.run / "adapter/a1"
    copy(source, target, manifest.read_manifest(source)[0])
    served.append((target / "adapter/adapter_model.safetensors").stat().st_mtime_ns)
    yield


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"maxLoss": 1.4}, "maxLoss is 1.4"),
        ({"minImprovement": 0.5}, "better by 25.0%; evaluation.gate.minImprovement is 50.0%"),
    ],
)
def test_the_gate_refuses_with_both_figures(tmp_path: Path, gate: dict[str, float], said: str) -> None:
    datasets = {"training": [{"uri": "pvc://claim/chats.jsonl"}], "validationFraction": 0.1}
    job = make_job(tmp_path, spec={"evaluation": {"gate": gate}, "datasets": datasets})
    ended(job)
    _, report = reported(job)
    assert (report.outcome, report.reason, report.adapter) == ("Failed", Reason.GATE_REFUSED, None)
    assert "the validation loss is 1.5000, 2.0000 before" in report.message
    assert said in report.message
    assert "the adapter stays in jobs/tiny/adapter/a1" in report.message
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.1, 0.75, "the task score is 75.0%, the base model's 10.0%; evaluation.gate.minScore is 80.0%"),
        (None, 0.75, "the task score is 75.0%; evaluation.gate.minScore is 80.0%"),
        (None, None, "the gate needs a task score, and none was measured"),
        (0.1, 0.8, None),
    ],
)
def test_a_score_below_the_gates_is_refused(before: float | None, after: float | None, said: str | None) -> None:
    found = finish.refused(Gate(min_score=0.8), Metrics(task_score_before=before, task_score_after=after))
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


def test_everything_that_is_missed_is_told() -> None:
    metrics = Metrics(validation_loss_before=2.0, validation_loss_after=2.5, task_score_after=0.25)
    assert finish.refused(Gate(max_loss=1.0, min_improvement=0.1, min_score=0.5), metrics) == (
        "the validation loss is 2.5000, 2.0000 before, worse by 25.0%; evaluation.gate.maxLoss is 1; "
        "evaluation.gate.minImprovement is 10.0%; the task score is 25.0%; evaluation.gate.minScore is 50.0%"
    )


def test_a_gate_that_is_reached_lets_pass(tmp_path: Path) -> None:
    datasets = {"training": [{"uri": "pvc://claim/chats.jsonl"}], "validationFraction": 0.1}
    gate = {"maxLoss": 1.6, "minImprovement": 0.2}
    job = make_job(tmp_path, spec={"evaluation": {"gate": gate}, "datasets": datasets})
    ended(job)
    assert reported(job)[1].outcome == "Done"


def test_changed_bytes_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended(job)
    (job.run / "adapter/a1/adapter/adapter_model.safetensors").write_bytes(b"WEIGHTS")
    code, report = reported(job)
    assert (code, report.reason) == (66, Reason.INPUT_MISSING)
    assert "was changed after it was finished" in report.message


def test_without_a_success_there_is_nothing_to_finish(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended(job, plan_digest="sha256:another")
    code, report = reported(job)
    assert (code, report.outcome) == (66, "Failed")
    assert "train first" in report.message
