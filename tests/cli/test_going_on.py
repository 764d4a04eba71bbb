"""From answers to preferences on a workstation: the second job goes on from the model that the first one ends in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tests.cli.station import Station

pytestmark = pytest.mark.timeout(600)


def write(station: Station, model: str, **spec: Any) -> None:
    """A preference job of 20 pairs, three of them held out."""
    pairs = [{"prompt": f"{i}?", "chosen": f"It is {i * 7}.", "rejected": f"It may be {i}."} for i in range(20)]
    data = {"train.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs)}
    job = {
        "apiVersion": "tuneward.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "brief"},
        "spec": {
            "model": {"uri": model},
            "objective": {"type": "DPO"},
            "datasets": {"training": [{"uri": "configmap://pairs/train.jsonl"}], "validationFraction": 0.15},
            "workers": {"gpusPerWorker": 0},
            **spec,
        },
    }
    held = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pairs"}, "data": data}
    (station.folder / "job.yaml").write_text(yaml.safe_dump_all([held, job]))


def trained(station: Station) -> dict[str, Any]:
    done = station.train("--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
def test_preferences_go_on_from_what_was_taught_before(station: Station) -> None:
    station.write(method={"rank": 4}, hyperparameters={"steps": 3, "learningRate": 1e-3})
    taught = trained(station)
    write(station, f"model://{taught['model']}", method={"rank": 8}, hyperparameters={"steps": 2})
    refused = station.train()
    assert refused.returncode == 78, refused.stdout + refused.stderr
    assert f"spec.method.rank is 8, and the adapter of FineTunedModel {taught['model']} has 4; leave " in refused.stderr
    write(station, f"model://{taught['model']}", hyperparameters={"steps": 2})
    assert station.tuneward("validate", "job.yaml", "--store", str(station.store)).returncode == 0
    report = json.loads(station.train("--restart", "--output", "json").stdout)
    # The reference is the first job's adapter: with the base model as the reference the first loss would be another.
    (file,) = (station.store / "jobs/brief/attempts").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["validation_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert abs(lines[1]["reward_margin"]) < 1e-3
    before, after = (load_file(Path(one["adapter"]) / "adapter_model.safetensors") for one in (taught, report))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    name = next(name for name in before if "lora_B" in name)
    assert before[name].any()
    assert 0 < float((after[name] - before[name]).norm()) < float(before[name].norm())


def test_a_model_that_is_not_there_is_told_with_those_that_are(station: Station) -> None:
    write(station, "model://small-0a1b2c3d")
    done = station.train()
    assert done.returncode == 66, done.stdout + done.stderr
    assert f"InputMissing: spec.model.uri names the model small-0a1b2c3d, and {station.store} holds: none" in done.stderr
