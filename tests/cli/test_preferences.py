"""Preferences from a file to an adapter, as a user has it: the example as it is, on the model that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.station import Station
from tests.support.cluster import ROOT

pytestmark = pytest.mark.timeout(900)

MODEL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
EXAMPLE = ROOT / "examples" / "preference.yaml"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Station:
    """A store with the demo's base model in it."""
    assert MODEL.is_dir(), "the demo's base model is missing; run: make model"
    found = Station(tmp_path_factory.mktemp("workshop"))
    done = found.tuneward("import", str(MODEL), "smollm2-135m-instruct", "--store", str(found.store))
    assert done.returncode == 0, done.stderr
    return found


def trained(station: Station, file: Path) -> dict[str, Any]:
    """What `tuneward train` reports."""
    done = station.tuneward("train", str(file), "--store", str(station.store), "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def held_out(station: Station, job: str) -> list[dict[str, float]]:
    """Lines of the only attempt's metrics.jsonl that are about the validation pairs."""
    (file,) = (station.store / "jobs" / job / "attempts").glob("*/metrics.jsonl")
    return [line for line in map(json.loads, file.read_text().splitlines()) if "validation_loss" in line]


@pytest.mark.slow
def test_the_example_learns_to_prefer_and_ends_in_an_adapter(workshop: Station) -> None:
    """Pairs that it has not seen are told apart better than by the model it started from."""
    report = trained(workshop, EXAMPLE)
    assert (report["job"], report["phase"]) == ("brief", "Succeeded")
    assert (Path(report["adapter"]) / "adapter_model.safetensors").is_file()
    first, last = held_out(workshop, "brief")
    assert first["validation_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["validation_loss"] < 0.6
    assert last["validation_reward_accuracy"] == 1


def test_its_yaml_and_its_pairs_are_valid(workshop: Station) -> None:
    assert workshop.tuneward("validate", str(EXAMPLE)).returncode == 0
    pairs = workshop.tuneward("validate", str(ROOT / "examples/brief/training.jsonl"), "--model", str(MODEL))
    assert pairs.returncode == 0, pairs.stderr
    assert re.search(r"training\.jsonl +Preference +24 +48 ", pairs.stdout), pairs.stdout
