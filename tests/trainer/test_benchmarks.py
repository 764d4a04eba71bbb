"""What of the benchmark for a GPU can be seen without one."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("trainer_gpu")


@pytest.mark.parametrize(
    ("device", "no_trl", "liger", "expected"),
    [
        ("cuda", False, True, ["ours", "trl", "trl-liger"]),
        ("cuda", False, False, ["ours", "trl"]),
        ("cpu", False, True, ["ours", "trl"]),
        ("cuda", True, True, ["ours"]),
    ],
)
def test_who_runs(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str, no_trl: bool, liger: bool, expected: list[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if liger and name == "liger_kernel" else None)
    assert gpu.contestants(argparse.Namespace(device=device, no_trl=no_trl)) == expected
    assert set(expected) <= gpu.CONTESTANTS.keys()


def test_published_figures_name_their_source(gpu: ModuleType) -> None:
    assert {one["contestant"]: one["tokensPerSecond"] for one in gpu.PUBLISHED} == {"mistral-finetune": 5461, "NeMo": 25206}
    assert all(one["source"] and one["of"] for one in gpu.PUBLISHED)
