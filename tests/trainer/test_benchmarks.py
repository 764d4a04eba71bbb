"""What of the benchmark for a GPU can be seen without one."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.trainer.jobs import make_model, tiny_config

from tuneward_trainer import fp8

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("trainer_gpu")


@pytest.mark.parametrize(
    ("device", "no_trl", "liger", "expected"),
    [
        ("cuda", False, True, ["ours", "ours-fp8", "ours-fp8-quick", "trl", "trl-liger"]),
        ("cuda", False, False, ["ours", "ours-fp8", "ours-fp8-quick", "trl"]),
        ("cpu", False, True, ["ours", "ours-fp8", "ours-fp8-quick", "trl"]),
        ("cuda", True, True, ["ours", "ours-fp8", "ours-fp8-quick"]),
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


def test_ours_runs_with_plain_and_with_packed_weights(gpu: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(
        model=make_model(tmp_path / "tiny", tiny_config()), device="cpu", row=64, length=24, tokens=96, steps=1, warmup=0
    )
    for name in ("ours", "ours-fp8", "ours-fp8-quick"):
        assert gpu.measure(name, options)["tokensPerSecond"] > 0


def test_of_a_contestant_that_fails_a_line_says_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "contestants", lambda options: ["ours"])
    monkeypatch.setattr("sys.argv", ["-c", "raise SystemExit(3)", "--model", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: argparse.Namespace(only=None, device="cpu"))
    assert gpu.main() == 1
    lines = capfd.readouterr().out.splitlines()
    assert '"contestant": "ours", "failed": "exit code 3' in lines[0]
    assert len(lines) == 1 + len(gpu.PUBLISHED)


def test_a_gpu_that_multiplies_no_fp8_is_told_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert not fp8.supported(torch.device("cuda"))
    with pytest.raises(SystemExit, match="A100-SXM4-80GB multiplies no fp8"):
        gpu.ours_fp8(argparse.Namespace(), torch.device("cuda"))
