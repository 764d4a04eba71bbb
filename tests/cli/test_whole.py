"""All weights trained on a workstation: the example as it is, but on a model that is trained in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.station import Station, chats
from tests.support.cluster import ROOT

EXAMPLE = ROOT / "examples" / "full.yaml"


def test_the_example_ends_in_a_base_model_that_answers(station: Station) -> None:
    file = station.store.parent / "full.yaml"
    file.write_text(EXAMPLE.read_text().replace("imports/smollm2-135m-instruct", "imports/tiny"))
    done = station.tuneward("train", str(file), "--store", str(station.store), "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["job"], report["phase"]) == ("manual", "Succeeded")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        entry.name for entry in Path(report["folder"]).iterdir()
    }
    asked = station.tuneward(
        "chat", "--store", str(station.store), "--ask", "How heavy is it?", "--model", report["servedName"]
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    going_on = file.with_name("again.yaml")
    going_on.write_text(f"""
apiVersion: tuneward.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: again}}
spec:
  model: {{uri: "model://{report["model"]}"}}
  datasets: {{training: [{{uri: "pvc://tuneward-store/a.jsonl"}}]}}
  method: {{type: Full}}
""")
    (station.store / "a.jsonl").write_text(chats(8))
    assert f"spec.model.uri: model://{report['model']}" in done.stderr
    checked = station.tuneward("validate", str(going_on), "--store", str(station.store))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_the_example_learns_its_manual(tmp_path: Path) -> None:
    station = Station(tmp_path)
    model = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
    assert station.tuneward("import", str(model), model.name, "--store", str(station.store)).returncode == 0
    done = station.tuneward("train", str(EXAMPLE), "--store", str(station.store), "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (station.store / "jobs/manual/attempts").glob("*/metrics.jsonl")
    losses = [json.loads(line)["train_loss"] for line in file.read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
