"""The same YAML without Kubernetes: trained, and talked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.command import Command
from tests.support.cluster import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

EXAMPLE = ROOT / "examples" / "finetune.yaml"


@pytest.mark.slow
def test_the_example_ends_in_a_model_that_answers(command: Command, store: Path) -> None:
    """Slow only because the demo trains the same YAML; that a workstation makes a cluster's bytes is in test_faults."""
    report = json.loads(command.ok("train", str(EXAMPLE), "--store", str(store), "--output", "json"))
    heldout = json.loads((ROOT / "examples" / "lantern" / "heldout.jsonl").read_text().splitlines()[1])
    asked = ("--model", report["servedName"], "--ask", heldout["question"], "--output", "json")
    answers = json.loads(command.ok("chat", "--store", str(store), *asked))["answers"]
    assert heldout["keyword"] in answers[report["servedName"]]


def test_a_model_that_is_not_there_is_the_same_word_as_in_status(command: Command, tmp_path: Path) -> None:
    done = command.run("train", str(EXAMPLE), "--store", str(tmp_path / "empty"))
    assert done.returncode == 66, done.stderr
    assert "InputMissing: " in done.stderr
    assert "next: tuneward import" in done.stderr
