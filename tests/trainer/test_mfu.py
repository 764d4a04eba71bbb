"""MFU is needed operations over a data sheet's peak, or nothing; a trace holds the steps that were asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tests.trainer.jobs import make_job

from tuneward_trainer import memory
from tuneward_trainer.mfu import Utilization, peak_of
from tuneward_trainer.profile import Profile


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_of_this_very_card_or_unknown(name: str, tera: float | None) -> None:
    assert peak_of(name) == (None if tera is None else tera * 1e12)


def test_all_gpus_at_their_peak_are_one(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    costs = memory.costs_of(job.plan.prepared, job.store / "models/tiny", "cuda", 4)
    assert costs is not None
    found = Utilization.of(costs, "NVIDIA H100 80GB HBM3", 4)
    assert found is not None
    assert found.share(4 * 989e12 / costs.flops(memory.Choice(1))) == pytest.approx(1.0)
    # What is computed twice is not needed.
    assert found.flops < costs.flops(memory.Choice(1, recompute=True))
    assert Utilization.of(costs, "a CPU", 1) is None
    assert Utilization.of(None, "NVIDIA H200", 1) is None


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attempts/1").mkdir(parents=True)
    monkeypatch.setenv("TUNEWARD_PROFILE", "2-3")
    profile = Profile.asked(tmp_path, 1)
    assert profile is not None
    for step in (1, 2, 3, 4):
        with profile.around(step):
            torch.ones(1).mul(step)
    profile.close()
    (file,) = (tmp_path / "attempts/1").iterdir()
    assert file == profile.file
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mul" for event in events) == 2


def test_a_training_that_ends_before_keeps_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "attempts/1").mkdir(parents=True)
    profile = Profile(1, 9, tmp_path / "attempts/1")
    with profile.around(1):
        torch.ones(1)
    assert not profile.file.exists()
    profile.close()
    assert profile.file.exists()
