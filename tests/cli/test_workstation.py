"""What `tuneward train` decides from the run directory, before any process starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.operator.pictures import result
from tests.operator.world import DIGEST, finish_report, prepare_report

from tuneward_api.conditions import FailureClass
from tuneward_api.failures import DEFAULT_RETRIES, classify
from tuneward_api.files import FinishReport, Plan, PrepareReport, canonical_json
from tuneward_api.finetunejob import RunPolicy
from tuneward_cli import estimating, train, workstation
from tuneward_cli.documents import Loaded, load, load_valid, the_job
from tuneward_cli.errors import CommandError
from tuneward_cli.tries import HelperError, Tries, budget
from tuneward_cli.voice import Voice
from tuneward_cli.words import Seen

JOB = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: facts}
data: {train.jsonl: "{}"}
---
apiVersion: v1
kind: Service
metadata: {name: other}
---
apiVersion: tuneward.dev/v1alpha1
kind: FineTuneJob
metadata: {name: small}
spec:
  model: {uri: pvc://tuneward-store/imports/m}
  datasets: {training: [{uri: configmap://facts/train.jsonl}, {uri: pvc://chats/a.jsonl}]}
  hyperparameters: {learningRate: 1e-4}
  workers: {replicas: 4, gpusPerWorker: 0}
"""


def written(folder: Path, text: str = JOB) -> Loaded:
    file = folder / "job.yaml"
    file.write_text(text)
    return load_valid(file)


def laid_out(folder: Path, loaded: Loaded, *, restart: bool = False) -> workstation.Place:
    job = the_job(loaded)
    (folder / "chats").mkdir(exist_ok=True)
    place = workstation.place_of(job, folder / "store", {"chats": folder / "chats"})
    workstation.lay_out(place, loaded, job, restart=restart)
    return place


def test_the_run_directory_has_what_prepare_mounts(tmp_path: Path) -> None:
    place = laid_out(tmp_path, written(tmp_path))
    assert place.run == tmp_path / "store" / "jobs" / "small"
    assert (place.config_maps / "facts" / "train.jsonl").read_text() == "{}"
    assert (place.claims_dir / "chats").readlink() == tmp_path / "chats"
    assert '"uid":""' in place.request.read_text()


def test_the_same_file_again_goes_on(tmp_path: Path) -> None:
    laid_out(tmp_path, written(tmp_path))
    laid_out(tmp_path, written(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1e-4", "2e-4", "spec.hyperparameters.learningRate was 0.0001, now 0.0002"),
        ("learningRate: 1e-4", "seed: 3", "spec.hyperparameters.seed was not set, now 3"),
        ('"{}"', '"{1}"', "train.jsonl differs"),
    ],
    ids=["value", "field", "data"],
)
def test_another_spec_or_other_data_is_refused_until_restart(tmp_path: Path, old: str, new: str, said: str) -> None:
    place = laid_out(tmp_path, written(tmp_path))
    (place.run / "marker").write_text("")
    changed = written(tmp_path, JOB.replace(old, new))
    with pytest.raises(CommandError, match="belongs to another version of this job") as caught:
        laid_out(tmp_path, changed)
    assert said in caught.value.sentence
    assert (caught.value.code, caught.value.paste) == (
        78,
        f"tuneward train {changed.file} --name small --store {place.store} --claim chats={tmp_path / 'chats'} --restart",
    )
    laid_out(tmp_path, changed, restart=True)
    assert not (place.run / "marker").exists()


@pytest.mark.parametrize(("command", "name"), [("train", " --name small"), ("estimate", " --name small"), ("validate", "")])
def test_a_store_that_cannot_be_written_is_named_with_the_whole_command(tmp_path: Path, command: str, name: str) -> None:
    loaded = written(tmp_path)
    (tmp_path / "store").write_text("a file")
    (tmp_path / "chats").mkdir()
    place = workstation.place_of(the_job(loaded), tmp_path / "store", {"chats": tmp_path / "chats"})
    with pytest.raises(CommandError, match=r"^StoreNotWritable: .* cannot be written \(Not a directory\)") as caught:
        workstation.lay_out(replace(place, command=command), loaded, the_job(loaded), restart=False)
    said = f"tuneward {command} {loaded.file}{name} --store ANOTHER_DIR --claim chats={tmp_path / 'chats'}"
    assert (caught.value.code, caught.value.paste) == (78, said)


def test_a_claim_without_a_folder_is_named(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    job = the_job(loaded)
    with pytest.raises(CommandError, match="the claim chats is no folder") as caught:
        workstation.lay_out(workstation.place_of(job, tmp_path, {}), loaded, job, restart=False)
    assert caught.value.paste == "tuneward train FILE --claim chats=DIR"
    assert caught.value.code == 66


def test_a_claims_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    job = the_job(loaded)
    with pytest.raises(CommandError, match="/nix, which stands for the claim chats, is no folder") as caught:
        workstation.lay_out(workstation.place_of(job, tmp_path, {"chats": tmp_path / "nix"}), loaded, job, restart=False)
    assert (caught.value.code, caught.value.paste) == (66, f"ls {tmp_path}")


def test_a_restart_that_lacks_a_claim_removes_nothing(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    place = laid_out(tmp_path, loaded)
    (place.run / "marker").write_text("")
    with pytest.raises(CommandError, match="the claim chats is no folder"):
        workstation.lay_out(replace(place, claims={}), loaded, the_job(loaded), restart=True)
    assert (place.run / "marker").exists()


def test_a_config_map_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"configmap://facts/train\.jsonl names no ConfigMap"):
        laid_out(tmp_path, written(tmp_path, JOB.replace("name: facts", "name: fiction")))


def finished_job(place: workstation.Place, loaded: Loaded) -> str:
    """Leaves what a job that ended in an adapter leaves, and gives the name of its model."""
    found = PrepareReport.model_validate(prepare_report()).prepared
    assert found is not None
    plan = Plan(request=workstation.request_of(the_job(loaded)), prepared=found)
    place.plan.write_text(canonical_json(plan.to_json()))
    (place.run / "finish").mkdir()
    (place.run / "finish/report.json").write_text(canonical_json(finish_report()))
    return "small-abababab"


def test_a_job_goes_on_from_a_model_of_the_store(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    name = finished_job(laid_out(tmp_path, loaded), loaded)
    second = JOB.replace("name: small", "name: next").replace("pvc://tuneward-store/imports/m", f"model://{name}")
    loaded = written(tmp_path, second)
    request = workstation.lay_out(place := laid_out(tmp_path, loaded), loaded, the_job(loaded), restart=False)
    parent = request.parent
    assert parent is not None
    assert (parent.name, parent.artifact_digest) == (name, DIGEST)
    assert (request.base_uri, parent.base_digest) == ("pvc://tuneward-store/imports/tiny", DIGEST)
    # What it was made from stays, though the earlier job is gone.
    shutil.rmtree(tmp_path / "store/jobs/small")
    assert workstation.lay_out(place, loaded, the_job(loaded), restart=False) == request


def test_a_model_that_is_not_in_the_store_is_named_with_those_that_are(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    finished_job(laid_out(tmp_path, loaded), loaded)
    other = JOB.replace("name: small", "name: next").replace("pvc://tuneward-store/imports/m", "model://nix")
    with pytest.raises(CommandError, match=r"names the model nix, and .*store holds: small-abababab") as caught:
        laid_out(tmp_path, written(tmp_path, other))
    assert caught.value.code == 66


def test_an_estimate_for_a_family_that_is_not_known_says_so(tmp_path: Path) -> None:
    report = PrepareReport.model_validate(prepare_report())
    assert report.prepared is not None
    plan = Plan(request=workstation.request_of(the_job(written(tmp_path))), prepared=report.prepared)
    memory = dict.fromkeys(("weights", "state", "activations", "buffers", "live", "resident", "available"), 1 << 30)
    found = {
        "device": "cpu", "family": {"name": "newcomer", "known": False}, "rows": 1, "recompute": False, "sharded": False,
        "memory": memory, "fits": True, "remedy": None,
        "flops": 1e12, "flopsPerSecond": 1e11, "rateSource": "measured", "seconds": 10.0,
    }  # fmt: skip
    said = list(estimating.lines(plan, found))
    assert "          (the layers of newcomer are taken for a Llama's: memory may be off)" in said
    assert said != list(estimating.lines(plan, {**found, "family": {"name": "llama", "known": True}}))


def test_other_kinds_are_named_and_skipped(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    assert workstation.skipped(loaded, the_job(loaded)) == ["Service/other"]


def test_two_jobs_need_a_name(tmp_path: Path) -> None:
    second = JOB.split("---\n")[-1].replace("name: small", "name: large")
    loaded = written(tmp_path, f"{JOB}---\n{second}")
    with pytest.raises(CommandError, match="it holds: small, large"):
        the_job(loaded)
    assert the_job(loaded, "large").metadata["name"] == "large"


def test_all_problems_of_a_file_are_shown_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("1e-4", "-1").replace("replicas: 4", "replicas: many"))
    assert [problem.line for problem in load(file).problems] == [16, 17]
    with pytest.raises(CommandError, match=r"learningRate[^\n]*\n[^\n]*replicas"):
        load_valid(file)


def test_only_the_number_of_workers_may_change_between_runs(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    place = laid_out(tmp_path, loaded)
    fewer = workstation.with_workers(the_job(loaded), 1)
    request = workstation.lay_out(place, loaded, fewer, restart=False)
    assert request.spec.workers is not None
    assert request.spec.workers.replicas == 1
    assert request.spec.workers.gpus_per_worker == 0
    assert '"replicas":1' in place.request.read_text()


def test_a_finished_job_is_not_trained_again_by_other_workers(tmp_path: Path) -> None:
    loaded = written(tmp_path)
    place = laid_out(tmp_path, loaded)
    prepared = PrepareReport.model_validate(prepare_report()).prepared
    assert prepared is not None
    plan = Plan(request=workstation.request_of(the_job(loaded)), prepared=prepared)
    place.plan.write_text(canonical_json(plan.to_json()))
    attempt = place.run / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt / "result.json").write_text(canonical_json(result(planDigest=plan.digest()).to_json()))
    fewer = workstation.with_workers(the_job(loaded), 1)
    assert workstation.lay_out(place, loaded, fewer, restart=False) == plan.request
    assert Plan.model_validate_json(place.plan.read_bytes()).digest() == plan.digest()


def test_budgets_come_from_the_spec_first() -> None:
    policy = RunPolicy.model_validate({"retries": {"infrastructure": 0, "outOfMemory": 7}})
    found = budget(policy)
    assert found[FailureClass.INFRASTRUCTURE] == 0
    assert found[FailureClass.OUT_OF_MEMORY] == 7
    assert found[FailureClass.HANG] == DEFAULT_RETRIES[FailureClass.HANG]


@pytest.mark.parametrize(("loss", "shown"), [(0.5, 0.5), (None, 7.9)])
def test_the_last_line_is_that_of_the_result(loss: float | None, shown: float) -> None:
    last = Seen(3, 100, loss=7.9, tokens_per_second=99.0, eta_seconds=4, memory_bytes=5)
    found = train.ended(last, result(metrics={"trainLoss": loss} if loss is not None else {}))
    assert found == Seen(100, 100, loss=shown, tokens_per_second=99.0, memory_bytes=5)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_job_that_ended_says_what_to_do_next(tmp_path: Path, kind: str) -> None:
    loaded = written(tmp_path)
    name = finished_job(place := laid_out(tmp_path, loaded), loaded)
    plan, report = Plan.model_validate_json(place.plan.read_bytes()), FinishReport.model_validate(finish_report())
    assert report.adapter is not None
    adapter = report.adapter.model_copy(update={"type": kind})
    store = tmp_path / "store"
    merge = f"tuneward merge {store / adapter.sub_path} {name} --model {store / plan.prepared.base.sub_path}"
    assert list(train.next_steps(place, plan, adapter)) == [
        f"  model {name}: another job goes on from it with spec.model.uri: model://{name}",
        *([f"  vLLM loads no DoRA; it serves the model that this makes: {merge}"] if kind == "DoRA" else []),
        f"next: tuneward chat --store {store}",
    ]


def hung() -> HelperError:
    said = "prepare stood still for 1800 s and was ended"
    return HelperError(f"Hang: {said}", paste="", code=75, failure=classify(exit_code=75, reason="Hang", message=said))


def test_a_prepare_that_stood_still_is_tried_again_until_the_job_s_budget_is_spent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    waits: list[float] = []
    tries = Tries("small", budget(RunPolicy.model_validate({"retries": {"hang": 3}})), Voice(), waits.append)
    ends: Iterator[HelperError | str] = iter([hung(), hung(), "the plan", hung(), hung()])

    def prepare() -> str:
        found = next(ends)
        if isinstance(found, HelperError):
            raise found
        return found

    assert tries.until_done(prepare) == "the plan"
    with pytest.raises(HelperError, match="Hang: prepare stood still") as caught:
        tries.until_done(prepare)
    assert caught.value.code == 75
    assert waits == [1, 2, 4]
    said = [line for line in capsys.readouterr().out.splitlines() if "small: Recovering" in line]
    assert [line.rpartition(" (")[2] for line in said] == [f"try {number} of 3)" for number in (1, 2, 3)]
