"""`tuneward estimate` and `tuneward init`: what a job will cost, and a first one to begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.cli.station import Station, chats

from tuneward_api.loader import load_documents
from tuneward_api.validate import validate_document

pytestmark = pytest.mark.timeout(600)


def test_an_estimate_says_what_the_training_will_take_and_leaves_no_job(station: Station) -> None:
    station.write(hyperparameters={"steps": 12, "batchTokens": 256})
    done = station.tuneward("estimate", "job.yaml", "--store", str(station.store), "--output", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not station.run.exists()
    assert not list(station.store.glob("estimates/*"))
    memory = found["memory"]
    assert memory["live"] == memory["weights"] + memory["state"] + memory["activations"] + memory["buffers"]
    assert memory["weights"] == 4 * found["parameters"]
    assert found["fits"]
    assert memory["live"] < memory["resident"] < memory["available"] == 4 << 30
    assert found["hyperparameters"]["steps"] == 12
    assert found["seconds"] == pytest.approx(found["flops"] / found["flopsPerSecond"])
    assert "measured on this CPU" in found["rateSource"]


def test_a_gpu_can_be_asked_about_where_there_is_none(station: Station) -> None:
    station.write()
    done = station.tuneward("estimate", "job.yaml", "--store", str(station.store), "--gpu-memory", "0.5")
    assert done.returncode == 0, done.stderr
    assert ", where the GPU has 0.50 GiB; " in done.stdout
    said = "that is more than there is: even rows of 16 tokens need more than a rank's 0.5 GiB: use GPUs with "
    assert said in done.stdout
    assert "  time    unknown for this device: " in done.stdout
    assert f"next: tuneward train job.yaml --store {station.store}" in done.stdout


def test_what_a_failed_estimate_says_to_look_at_is_there(station: Station) -> None:
    station.write(model={"uri": "pvc://tuneward-store/nix"})
    done = station.tuneward("estimate", "job.yaml", "--store", str(station.store))
    assert done.returncode == 66
    paste = done.stderr.splitlines()[-1].split()
    assert paste[:3] == ["next:", "tail", "-50"]
    assert "nix" in Path(paste[3]).read_text()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "chats" / "Support_Chats.jsonl"
    file.parent.mkdir()
    file.write_text(chats(40))
    return file


def test_a_file_that_no_address_can_name_is_renamed_first(station: Station, data: Path, tmp_path: Path) -> None:
    spaced = data.rename(data.with_name("my chats.jsonl"))
    done = station.tuneward("init", "--model", str(tmp_path / "tiny"), "--data", str(spaced), "--store", str(station.store))
    assert done.returncode == 2
    assert "my chats.jsonl cannot stand in an address: its name has spaces" in done.stderr
    assert f"next: mv '{spaced}' '{data.with_name('my_chats.jsonl')}'" in done.stderr


def test_init_writes_a_job_that_trains(station: Station, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    first = ("init", "--model", str(model), "--data", str(data), "--store", str(station.store))
    done = station.tuneward(*first, "--output", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["claims"] == {"models": str(tmp_path), "data": str(data.parent)}
    text = (tmp_path / "job.yaml").read_text()
    job = yaml.safe_load(text)
    assert job["metadata"]["name"] == "support-chats"
    assert job["spec"] == {
        "model": {"uri": "pvc://models/tiny"},
        "datasets": {"training": [{"uri": "pvc://data/Support_Chats.jsonl"}]},
        "workers": {"gpusPerWorker": 0},
    }
    # Every setting that is commented out is a valid one, with the value that the trainer chose.
    whole = "\n".join(
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in text.splitlines()[3:]
    )
    (document,) = load_documents(whole.replace("; or steps: …", ""), file="job.yaml")
    resource, problems = validate_document(document)
    assert (problems, resource is not None) == ([], True)
    assert document.value["spec"]["hyperparameters"]["learningRate"] == told["hyperparameters"]["learningRate"]
    again = station.tuneward(*first)
    assert again.returncode == 2
    assert "job.yaml is there already, and is not overwritten" in again.stderr
    # The command stands in the file, so that it is found again.
    train = text.splitlines()[2].split()
    assert train[:3] == ["#", "tuneward", "train"]
    trained = station.tuneward(*train[2:])
    assert trained.returncode == 0, trained.stderr
    assert "support-chats: Succeeded" in trained.stdout
    # It took just what was estimated.
    plan = json.loads((station.store / "jobs/support-chats/plan.json").read_text())["prepared"]
    assert plan["estimate"]["memoryBytes"] == told["memory"]["resident"]
    assert plan["estimate"]["flops"] == pytest.approx(told["flops"])
    assert (plan["hyperparameters"], plan["data"]["summary"]) == (told["hyperparameters"], told["data"])
