"""The same YAML without Kubernetes: interrupted, gone on with, and talked to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.command import Command, Demo
from tests.support.cluster import ROOT
from tests.support.wait import wait_for

from tuneward_api import manifest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

TRAINS = re.compile(r"step [3-9]/")
EXAMPLE = ROOT / "examples" / "finetune.yaml"


def test_train_is_interrupted_goes_on_and_ends_in_the_adapter_that_a_cluster_makes(
    demo: Demo, command: Command, store: Path
) -> None:
    train = [sys.executable, "-m", "tuneward_cli", "train", str(EXAMPLE), "--store", str(store)]
    log = store / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen(train, cwd=ROOT, env=command.environment(), stdout=output, stderr=output)
        try:
            wait_for(lambda: TRAINS.search(log.read_text()) or process.poll() is not None, what="a third step", timeout=400)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=180) == 143, log.read_text()
        finally:
            process.kill()
    said = log.read_text()
    assert "a checkpoint is being saved" in said
    assert f"next: tuneward train {EXAMPLE} --store {store}" in said
    assert not list((store / "adapters").glob("sha256-*"))

    done = command.run("train", str(EXAMPLE), "--store", str(store), "--output", "json")
    assert done.returncode == 0, done.stderr
    assert "step 1/" not in done.stderr, "it began anew"
    report = json.loads(done.stdout)
    assert report["phase"] == "Succeeded"
    assert manifest.verify(Path(report["adapter"]).parent) == report["digest"]
    # The same bytes: a served name ends in the digest's first digits.
    assert report["servedName"].rpartition(":")[2] == demo.report["model"].rpartition(":")[2]

    heldout = json.loads((ROOT / "examples" / "lantern" / "heldout.jsonl").read_text().splitlines()[1])
    asked = (
        "chat",
        "--store",
        str(store),
        "--model",
        report["servedName"],
        "--ask",
        heldout["question"],
        "--output",
        "json",
    )
    answers = json.loads(command.ok(*asked))["answers"]
    assert heldout["keyword"] in answers[report["servedName"]]


def test_a_model_that_is_not_there_is_the_same_word_as_in_status(command: Command, tmp_path: Path) -> None:
    done = command.run("train", str(EXAMPLE), "--store", str(tmp_path / "empty"))
    assert done.returncode == 66, done.stderr
    assert "InputMissing: " in done.stderr
    assert "next: tuneward import" in done.stderr
