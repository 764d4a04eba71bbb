"""Trackers through their own libraries, which `make test-slow` installs in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.jobs import Job, make_job
from tests.trainer.runs import JOINED, RETRAINED, attempt

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".build/trackers/bin/python"
KEY = "local-0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.slow


def job_with(tmp_path: Path, trackers: dict[str, Any]) -> Job:
    return make_job(tmp_path / "store", spec={"trackers": trackers})


def track(job: Job, name: str, **variables: str) -> list[dict[str, Any]]:
    """All attempts of RETRAINED, one after the other, each with a process that follows it; what each said last."""
    said = []
    for number, (first, lines) in RETRAINED.items():
        attempt(job.run, number, first, lines)
        status = job.run / "status"
        status.mkdir(exist_ok=True)
        (status / "rank-0.json").write_text(json.dumps({"attempt": number}))
        command: list[str | Path] = [PYTHON, "-m", "tuneward_trainer.trackers", name, job.plan_file, status, job.run]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": f"{ROOT}/api:{ROOT}/trainer",
            "HOME": str(job.store / "home"),
            **variables,
        }
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        said.append(json.loads((status / f"tracker-{name}.json").read_text()))
    return said


def read(program: str, *arguments: object, **variables: str) -> Any:
    """What a library finds in what it kept."""
    done = subprocess.run(
        [PYTHON, "-c", program, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rounded(points: list[list[float]]) -> dict[int, float]:
    found = {int(step): round(value, 3) for step, value in points}
    assert len(found) == len(points), f"a step twice: {points}"
    return found


TENSORBOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}))
"""


def test_tensorboard_reads_one_run_without_a_step_twice(tmp_path: Path) -> None:
    for number, (first, lines) in RETRAINED.items():
        attempt(tmp_path, number, first, lines)
    found = read(TENSORBOARD, tmp_path / "tensorboard")
    assert rounded(found["train/loss"]) == JOINED
    assert rounded(found["validation/loss"]) == {0: 9.0, 6: 0.5}


WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
def records(data):
    # LevelDB's log, of less than one block.
    at = 7
    while at + 7 <= len(data):
        size = struct.unpack_from("<H", data, at + 4)[0]
        yield data[at + 7 : at + 7 + size]
        at += 7 + size
runs = []
for file in sorted(Path(sys.argv[1]).rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
    run = {"rows": []}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
        if record.HasField("history"):
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            run["rows"].append([record.history.step.num, items])
    runs.append(run)
print(json.dumps(runs))
"""


def test_wandb_has_one_run_and_no_key_on_disk(tmp_path: Path) -> None:
    job = job_with(tmp_path, {"wandb": {"project": "support"}})
    said = track(job, "wandb", WANDB_MODE="offline", WANDB_API_KEY=KEY)
    assert [state.get("message", "") for state in said] == ["", "", ""]
    runs = read(WANDB, job.run / "trackers")
    assert {(run["id"], run["project"], run["name"]) for run in runs} == {(runs[0]["id"], "support", "tiny")}
    # Offline nothing knows what an earlier attempt has kept, so each keeps all of it; a server takes each step once.
    rows = [[step, row["train/loss"]] for step, row in runs[-1]["rows"] if "train/loss" in row]
    assert rounded(rows) == JOINED
    assert {step: row["validation/loss"] for step, row in runs[-1]["rows"] if "validation/loss" in row} == {0: 9.0, 6: 0.5}
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in written if KEY.encode() in file.read_bytes()] == []


def test_wandb_without_a_key_says_what_to_set(tmp_path: Path) -> None:
    job = job_with(tmp_path, {"wandb": {}})
    said = track(job, "wandb")
    assert "spec.trackers.wandb.secretRef" in said[-1]["message"]
    assert "WANDB_API_KEY" in said[-1]["message"]


MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiment = client.get_experiment_by_name("support")
runs = client.search_runs([experiment.experiment_id])
history = {tag: [[m.step, m.value] for m in client.get_metric_history(runs[0].info.run_id, tag)] for tag in runs[0].data.metrics}
print(json.dumps([len(runs), runs[0].info.status, runs[0].data.params["base"], history]))
"""


def test_mlflow_has_one_run_with_each_step_once(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/mlruns"
    variables = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    job = job_with(tmp_path, {"mlflow": {"trackingUri": uri, "experiment": "support"}})
    said = track(job, "mlflow", **variables)
    assert [state.get("message", "") for state in said] == ["", "", ""]
    count, state, base, history = read(MLFLOW, uri, **variables)
    assert (count, state, base) == (1, "FINISHED", "pvc://claim/tiny")
    # What was sent stays: a step that is made again is not sent again.
    assert rounded(history["train/loss"]) == {1: 1.1, 2: 1.2, 3: 1.3, 4: 2.4, 5: 2.5, 6: 3.6}
    assert rounded(history["validation/loss"]) == {0: 9.0, 6: 0.5}


TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("support")
print(json.dumps([runs, SQLiteStorage.get_logs("support", runs[0])]))
"""


def test_trackio_has_one_run_with_each_step_once(tmp_path: Path) -> None:
    kept = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    job = job_with(tmp_path, {"trackio": {"project": "support"}})
    said = track(job, "trackio", **kept)
    assert [(state.get("message", ""), state["url"]) for state in said] == [("", "trackio show --project support")] * 3
    runs, logs = read(TRACKIO, **kept)
    assert len(runs) == 1
    assert rounded([[row["step"], row["train/loss"]] for row in logs if "train/loss" in row]) == {
        1: 1.1, 2: 1.2, 3: 1.3, 4: 2.4, 5: 2.5, 6: 3.6,
    }  # fmt: skip
    assert {row["step"]: row["validation/loss"] for row in logs if "validation/loss" in row} == {0: 9.0, 6: 0.5}
