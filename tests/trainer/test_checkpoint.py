"""Checkpoints are complete or not there, whatever interrupts their writing."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.trainer.jobs import make_job

from tuneward_trainer import checkpoint, saving
from tuneward_trainer.distributed import be_deterministic
from tuneward_trainer.endings import ConfigBadError
from tuneward_trainer.session import Session, conclude
from tuneward_trainer.train import train

IDENTITY = {"base": "sha256:a", "data": "sha256:b", "shapes": {"w": [3]}}
HERE = {"torch": "2", "device": "CPU AVX2", "threads": 1}
FACTS = {"identity": IDENTITY, "circumstances": HERE, "notes": {"validation_loss_before": 2.0}}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "exp_avg.w": torch.zeros(3), "exp_avg_sq.w": torch.zeros(3)}


def snapshot(step: int, facts: dict[str, Any] = FACTS) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(step, state(step), {**facts, "watch": {"sound": [float(step)], "suspects": []}})


def write(run: Path, step: int, *, attempt: int = 1, facts: dict[str, Any] = FACTS) -> Path:
    return run / checkpoint.write(run, snapshot(step, facts), attempt=attempt).directory


def newest_step(run: Path) -> int | None:
    found = checkpoint.newest(run, IDENTITY, HERE)
    return None if found is None else found.step


def test_the_newest_complete_one_of_any_attempt_is_taken(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    write(tmp_path, 3, attempt=1)
    write(tmp_path, 9, attempt=1)
    write(tmp_path, 6, attempt=2)
    found = checkpoint.newest(tmp_path, IDENTITY, HERE)
    assert found is not None
    assert (found.step, found.resume, found.notes) == (9, "exact", {"validation_loss_before": 2.0})
    assert found.watch == {"sound": [9.0], "suspects": []}
    assert isinstance(found.state, dict)
    assert torch.equal(found.state["w"], torch.full((3,), 9.0))
    assert found.saved.directory == "checkpoints/step-00000009.a1"


def test_one_without_a_manifest_or_with_a_changed_byte_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (write(tmp_path, 6) / "MANIFEST.json").unlink()
    file = write(tmp_path, 9) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert newest_step(tmp_path) == 3


@pytest.mark.parametrize("key", ["base", "data", "shapes"])
def test_another_base_data_or_shape_refuses_the_resume(tmp_path: Path, key: str) -> None:
    write(tmp_path, 3)
    with pytest.raises(ConfigBadError, match=f"another {key}"):
        checkpoint.newest(tmp_path, {**IDENTITY, key: "other"}, HERE)


def test_another_torch_or_thread_count_makes_it_equivalent_and_says_why(tmp_path: Path) -> None:
    write(tmp_path, 3)
    found = checkpoint.newest(tmp_path, IDENTITY, {**HERE, "torch": "3", "threads": 4})
    assert found is not None
    assert found.resume == "equivalent (torch 2 -> 3, threads 1 -> 4)"


@pytest.mark.parametrize(
    ("deterministic", "resume"),
    [(True, "exact"), (False, "equivalent (this GPU's attention kernels are not deterministic)")],
)
def test_on_a_gpu_only_deterministic_kernels_make_it_exact(tmp_path: Path, deterministic: bool, resume: str) -> None:
    here = {"torch": "2", "device": "NVIDIA H100", "threads": 0, "deterministic": deterministic}
    write(tmp_path, 3, facts={**FACTS, "circumstances": here})
    found = checkpoint.newest(tmp_path, IDENTITY, here)
    assert found is not None
    assert found.resume == resume


def test_deterministic_kernels_are_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_only_the_newest_are_kept_and_later_attempts_are_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 2, attempt=7)
    (write(tmp_path, 9) / "MANIFEST.json").unlink()
    checkpoint.prune(tmp_path, keep=2, attempt=1)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002.a7",
        "step-00000003.a1",
        "step-00000004.a1",
        # Newer than any complete one: another gang may be at it.
        "step-00000009.a1",
    ]


def test_those_of_a_diverged_state_are_removed_and_a_later_attempts_are_not(tmp_path: Path) -> None:
    for step, attempt in ((3, 1), (6, 2), (9, 1), (9, 2), (12, 3)):
        write(tmp_path, step, attempt=attempt)
    checkpoint.discard(tmp_path, step=6, attempt=2)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-00000003.a1", "step-00000012.a3"]


def test_after_a_divergence_the_last_one_is_the_newest_that_is_left(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, attempt=1, keep=9, facts=FACTS)
    for step in (3, 6, 9):
        saver.save(snapshot(step))
    saver.discard(6)
    assert saver.last is not None
    assert (saver.last.step, saver.last.directory) == (3, "checkpoints/step-00000003.a1")
    saver.discard(0)
    assert saver.last is None


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_one_and_the_training(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, attempt=1, keep=2, facts=FACTS)
    saver.save(snapshot(3))
    assert saver.wait() is None
    with full_disk():
        saver.save(snapshot(6))
        assert isinstance(saver.wait(), OSError)
    assert newest_step(tmp_path) == 3
    assert saver.last is not None
    assert saver.last.step == 3
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.a1"]
    saver.save(snapshot(9))
    assert saver.wait() is None
    assert newest_step(tmp_path) == 9


def test_a_disk_that_is_full_for_a_while_costs_no_step(
    tmp_path: Path, begun: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that a step leaves can be written, on the store and beside it; the bytes are those of a training with room."""
    job = make_job(tmp_path, hyper={"steps": 7}, spec={"checkpoint": {"everySteps": 2}})
    train(begun(job, ahead=False, stop_at=3))
    session = begun(job, ahead=False)
    session.reporter._file = tmp_path / "rank-0.json"
    with full_disk():
        train(session)
        assert session.saver is not None
        assert isinstance(session.saver.wait(), OSError)
    assert max(folder.name for folder in (job.run / "checkpoints").iterdir()) == "step-00000004.a1"
    assert caplog.text.count("the figures of step 5 and later ones may be missing") == 1
    conclude(session, seconds=0)
    whole = job.again("whole")
    train(session := begun(whole, ahead=False))
    conclude(session, seconds=0)
    assert job.adapter() == whole.adapter()


def test_one_that_is_cut_short_at_any_sync_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a kill there; the next try writes over what it left."""
    write(tmp_path, 3)
    real, left = os.fsync, 0

    class Killed(BaseException):
        pass

    def sync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    seen = []
    for syncs in range(20):
        left = syncs
        try:
            write(tmp_path, 6)
        except Killed:
            seen.append(newest_step(tmp_path))
        else:
            break
    # Files, their folder and the manifest; from its name on the new one is there.
    assert seen == [3, 3, 3, 3, 6, 6]
    assert newest_step(tmp_path) == 6


def test_the_best_state_that_is_saved_already_is_not_written_over(tmp_path: Path) -> None:
    """The last step's is saved before it is known to be the best: with `keep: 1` there is no other."""
    saver = checkpoint.Saver(tmp_path, attempt=1, keep=1, facts=FACTS)
    session = SimpleNamespace(
        saver=saver,
        engine=SimpleNamespace(step=6, save=lambda: state(6)),
        plan=SimpleNamespace(prepared=SimpleNamespace(hyperparameters=SimpleNamespace(steps=6))),
        watch=SimpleNamespace(memory=dict),
        stopped=False,
        unproved=None,
        saved_step=3,
    )
    saving.save(cast(Session, session))
    assert saver.wait() is None
    with full_disk():
        saving.save(cast(Session, session), proved=True)
        saver.wait()
    assert newest_step(tmp_path) == 6


def test_a_half_removed_one_never_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 3)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    checkpoint.remove(folder)
    assert json.loads((folder / "state.json").read_text())
    assert newest_step(tmp_path) is None
