"""Everything that runs is killed for real, one after the other, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.command import Command, Demo
from tests.support.api import Object, checked, client, merge, path
from tests.support.cluster import ROOT
from tests.support.wait import wait_for

from tuneward_api import manifest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

STEPS = 12


def documents() -> str:
    """A job of two workers that is done in a minute, with its data."""
    chats = "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"How much is {n} and {n}?"},
                    {"role": "assistant", "content": f"It is {2 * n}."},
                ]
            }
        )
        + "\n"
        for n in range(8)
    )
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hunted"}, "data": {"chats.jsonl": chats}}
    job = {
        "apiVersion": "tuneward.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "hunted"},
        "spec": {
            "model": {"uri": "pvc://tuneward-store/imports/smollm2-135m-instruct"},
            "datasets": {"training": [{"uri": "configmap://hunted/chats.jsonl"}]},
            "method": {"rank": 4},
            "hyperparameters": {"steps": STEPS, "batchTokens": 64},
            "workers": {
                "replicas": 2,
                "gpusPerWorker": 0,
                "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}},
            },
            "checkpoint": {"everySteps": 1},
        },
    }
    return f"{json.dumps(data)}\n---\n{json.dumps(job)}\n"


@dataclass(frozen=True)
class Killed:
    """What was left of the job: its file, its last status, and the step at which the cluster was killed."""

    file: Path
    status: Object
    cluster_killed_at: int


@pytest.fixture(scope="module")
def killed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    file = tmp_path_factory.mktemp("hunted") / "job.yaml"
    file.write_text(documents())
    demo.cluster.kubectl("apply", "-f", str(file))
    with client(demo.cluster.kubeconfig) as api:

        def status() -> Object:
            found: Object = checked(api.get(path("FineTuneJob", "default", "hunted"))).get("status", {})
            return found

        def ended() -> Object | None:
            seen = status()
            return seen if seen.get("phase") in ("Failed", "Succeeded") else None

        def at(step: int) -> bool:
            seen = status()
            assert ended() is None, seen
            return bool((seen.get("progress") or {}).get("step", 0) >= step)

        wait_for(lambda: at(2), what="two steps", timeout=400, interval=0.2)
        step = steps_of(demo, 1)[-1]
        kill_the_cluster(demo)
        demo.command.ok("up")
        # A checkpoint is written when the step after it has gone well.
        wait_for(lambda: at(step + 2), what="steps after the cluster's return", timeout=120, interval=0.2)
        os.kill(process_of("tuneward_operator", "run", within=demo), signal.SIGKILL)
        os.kill(process_of("tuneward_trainer", "train", within=demo, JOB_COMPLETION_INDEX="1"), signal.SIGKILL)
        return Killed(file, wait_for(ended, what="the end", timeout=600), step)


def kill_the_cluster(demo: Demo) -> None:
    """Every process of Kubernetes is in this one; the pods' own go on."""
    os.kill(json.loads((demo.command.home / "ready").read_text())["pid"], signal.SIGKILL)


def process_of(*words: str, within: Demo, **environment: str) -> int:
    """The process of this cluster's containers with these words in its command line and this environment."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    for shim in Path("/proc").glob("[0-9]*"):
        try:
            named = f"{within.command.home}/" in (shim / "cmdline").read_text()
            children = (shim / "task" / shim.name / "children").read_text().split() if named else []
            for child in map(Path("/proc").joinpath, children):
                line = (child / "cmdline").read_bytes().split(b"\0")
                known = set((child / "environ").read_bytes().split(b"\0"))
                if {word.encode() for word in words} <= set(line) and wanted <= known:
                    return int(child.name)
        except OSError:
            continue
    raise AssertionError(f"no process {' '.join(words)} with {environment}")


def steps_of(demo: Demo, attempt: int) -> list[int]:
    """Steps that an attempt wrote into its metrics."""
    (file,) = demo.command.home.glob(f"volumes/**/jobs/hunted-*/attempts/{attempt}/metrics.jsonl")
    return [line["step"] for line in map(json.loads, file.read_text().splitlines()) if "train_loss" in line]


def test_a_gang_outlives_the_cluster_and_a_lost_worker_costs_no_saved_step(demo: Demo, killed: Killed) -> None:
    assert killed.status["phase"] == "Succeeded", killed.status
    first, second = killed.status["attempts"]
    assert first["lastStep"] > killed.cluster_killed_at
    assert steps_of(demo, 1)[: first["lastStep"]] == list(range(1, first["lastStep"] + 1))
    assert (second["resume"], second["fromStep"] > killed.cluster_killed_at) == ("exact", True)
    assert steps_of(demo, 2) == list(range(second["fromStep"] + 1, STEPS + 1))


@pytest.mark.slow
def test_a_workstation_that_was_interrupted_makes_the_same_bytes(command: Command, store: Path, killed: Killed) -> None:
    # One worker where the cluster has two: each with all processors, since a product's last bits depend on its threads.
    arguments = ("train", str(killed.file), "--store", str(store), "--workers", "1")
    train = [sys.executable, "-m", "tuneward_cli", *arguments]
    log = store / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen(train, cwd=ROOT, env=command.environment(), stdout=output, stderr=output)
        try:
            trains = re.compile(r"step [3-9]/")
            wait_for(lambda: trains.search(log.read_text()) or process.poll() is not None, what="a third step", timeout=400)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=180) == 143, log.read_text()
        finally:
            process.kill()
    said = log.read_text()
    assert "a checkpoint is being saved" in said
    assert f"next: tuneward {' '.join(arguments)}" in said
    assert not list((store / "adapters").glob("sha256-*"))

    done = command.run(*arguments, "--output", "json")
    assert done.returncode == 0, done.stderr
    assert "step 1/" not in done.stderr, "it began anew"
    report = json.loads(done.stdout)
    assert report["phase"] == "Succeeded"
    assert manifest.verify(Path(report["adapter"]).parent) == report["digest"]
    assert report["digest"] == killed.status["model"]["digest"]


def test_a_killed_engine_gets_its_adapters_back_with_the_operator_down(demo: Demo) -> None:
    def scale(replicas: int) -> None:
        where = path("Deployment", "tuneward-system", "tuneward-operator")
        with client(demo.cluster.kubeconfig) as api:
            merge(api, where, {"spec": {"replicas": replicas}})
            wait_for(
                lambda: checked(api.get(where))["status"].get("readyReplicas", 0) == replicas, what=f"{replicas} operators"
            )

    asked = demo.report["questions"][0]
    scale(0)
    engine = process_of("tuneward_serving", "engine", within=demo)
    os.kill(engine, signal.SIGKILL)

    def answers() -> bool:
        done = demo.command.run("chat", "--model", demo.report["model"], "--ask", asked["question"], "--output", "json")
        return done.returncode == 0 and json.loads(done.stdout)["answers"] == {demo.report["model"]: asked["tuned"]}

    wait_for(answers, what="the tuned model's answer", timeout=300, interval=1)
    assert process_of("tuneward_serving", "engine", within=demo) != engine
    scale(1)
