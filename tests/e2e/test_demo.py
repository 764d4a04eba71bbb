"""The promise, end to end: a job ends in a model that answers. Then what a person does by hand on the same cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.e2e.command import MODEL, Demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def test_the_tuned_model_answers_what_the_base_model_cannot(demo: Demo) -> None:
    wrong = [item for item in demo.report["questions"] if not item["right"]["tuned"]]
    assert demo.report["score"]["base"] == 0
    assert demo.report["score"]["of"] == 10
    # 9 or 10 where it was settled; kernels differ between processors.
    assert demo.report["score"]["tuned"] >= 8, wrong


def test_the_tuned_model_learnt_and_says_so(demo: Demo) -> None:
    metrics = demo.report["metrics"]
    assert metrics["validationLossAfter"] < 0.6 * metrics["validationLossBefore"]
    assert re.fullmatch(r"ft:smollm2-135m-instruct:lantern:\d{8}:[0-9a-f]{8}", demo.report["model"])


def test_it_was_said_how_far_it_is_and_what_to_do_next(demo: Demo) -> None:
    assert re.search(r"… lantern: Running \(trains\): step \d+/\d+, loss \d", demo.said)
    assert "Held-out questions answered: 0 of 10 before" in demo.said
    assert f"export KUBECONFIG={demo.cluster.kubeconfig}; kubectl get ftj,ftm,msv" in demo.said
    assert "tuneward down" in demo.said


def test_kubectl_get_shows_the_columns(demo: Demo) -> None:
    head, row = demo.cluster.kubectl("get", "ftj").splitlines()
    assert head.split() == ["NAME", "PHASE", "PROGRESS", "LOSS", "ETA", "MODEL", "AGE"]
    assert row.split()[:2] == ["lantern", "Succeeded"]
    listed = demo.cluster.kubectl("get", "ftj,ftm,msv", "-o", "name").split()
    assert [name.split(".")[0] for name in listed] == ["finetunejob", "finetunedmodel", "modelserver"]


def test_kubectl_wait_returns_on_the_end(demo: Demo) -> None:
    said = demo.cluster.kubectl("wait", "--for=condition=Finished", "ftj/lantern", "--timeout=5s")
    assert said.strip().endswith("condition met")


def test_kubectl_describe_shows_the_way_of_the_job(demo: Demo) -> None:
    described = demo.cluster.kubectl("describe", "ftj", "lantern")
    for word in ("Phase:", "Succeeded", "Resolved:", "Attempts:", "Events:"):
        assert word in described


def test_kubectl_explain_describes_each_field(demo: Demo) -> None:
    explained = demo.cluster.kubectl("explain", "ftj.spec.datasets")
    assert "Training and validation data." in explained
    assert "validationFraction" in explained


def test_kubectl_logs_of_a_worker(demo: Demo) -> None:
    pods = demo.cluster.kubectl("get", "pods", "-l", "tuneward.dev/role=attempt", "-o", "name").split()
    assert len(pods) == 1
    by_hand = demo.cluster.kubectl("logs", pods[0])
    assert by_hand.strip()
    assert demo.command.ok("logs", "lantern").strip() == by_hand.strip()


def test_watch_says_the_end_of_a_finished_job(demo: Demo) -> None:
    assert json.loads(demo.command.ok("watch", "lantern", "--output", "json"))["phase"] == "Succeeded"


def test_status_says_that_there_is_something_to_talk_to(demo: Demo) -> None:
    report = json.loads(demo.command.ok("status", "--output", "json"))
    assert report["next"] == "tuneward chat"
    assert [job["phase"] for job in report["jobs"]] == ["Succeeded"]


def test_import_again_changes_nothing(demo: Demo, tmp_path: Path) -> None:
    done = demo.command.run("import", str(MODEL), "smollm2-135m-instruct")
    assert "is there already" in done.stdout


def test_a_terminal_shows_both_answers_side_by_side(demo: Demo) -> None:
    asked = demo.report["questions"][0]
    shown = demo.command.typed([asked["question"]], "chat")
    table = shown[shown.rindex(f"> {asked['question']}") :]
    assert demo.report["model"] in table
    assert demo.report["baseModel"] in table
    assert " ".join(asked["tuned"].split()[:3]) in table


def failing(name: str, samples: list[object], **spec: object) -> str:
    """A job that cannot end in a model, with its data, as YAML (which JSON is)."""
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"chats.jsonl": lines}}
    job = {
        "apiVersion": "tuneward.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "pvc://tuneward-store/imports/smollm2-135m-instruct"},
            "datasets": {"training": [{"uri": f"configmap://{name}/chats.jsonl"}], "validationFraction": 0.5},
            "hyperparameters": {"steps": 1},
            "workers": {"gpusPerWorker": 0, "resources": {"requests": {"cpu": "1", "memory": "2Gi"}}},
            **spec,
        },
    }
    return f"{json.dumps(data)}\n---\n{json.dumps(job)}\n"


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = [chat(("user", f"How much is {n} and {n}?"), ("assistant", f"It is {2 * n}.")) for n in range(8)]


@pytest.mark.parametrize(
    ("name", "samples", "spec", "reason"),
    [
        ("bad-role", [*GOOD, chat(("user", "Hello"), ("asistant", "Hi"))], {}, "DataInvalid"),
        # Trains twice for a sentence of finish, whose own tests are elsewhere.
        pytest.param("no-better", GOOD, {"evaluation": {"gate": {"maxLoss": 1e-6}}}, "GateRefused", marks=pytest.mark.slow),
    ],
)
def test_a_failing_job_says_the_same_on_a_cluster_and_without(
    demo: Demo, store: Path, tmp_path: Path, name: str, samples: list[object], spec: dict[str, object], reason: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(failing(name, samples, **spec))
    demo.cluster.kubectl("apply", "-f", str(file))
    watched = demo.command.run("watch", name, timeout=400)
    job = demo.cluster.get("ftj", name)
    metadata, status = job["metadata"], job["status"]
    assert isinstance(metadata, dict)
    assert isinstance(status, dict)
    trained = demo.command.run("train", str(file), "--store", str(store), timeout=400)
    said = f"{reason}: {status['message']}"
    assert said in watched.stderr, watched.stderr
    # A workstation has no uid to tell two jobs of one name apart.
    assert said.replace(f"{name}-{metadata['uid'][:8]}", name) in trained.stderr, trained.stderr
    assert trained.returncode == watched.returncode != 0
