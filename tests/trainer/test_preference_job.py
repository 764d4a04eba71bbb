"""A preference job from its plan to its adapter: the same bytes on any number of ranks and after any kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.trainer.jobs import PREFERENCE, Gang, Job, filed, make_job, step_lines, train

from tuneward_api.files import Proof
from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import rundir
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.schedule import Schedule


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank, never interrupted."""
    return train(make_job(tmp_path_factory.mktemp("store"), objective=PREFERENCE))


def references(job: Job) -> dict[str, bytes]:
    """Name of a piece without its attempt -> its numbers."""
    return {file.parent.stem: file.read_bytes() for file in job.run.glob("reference/*/*/logprobs.f64")}


def metrics(job: Job) -> list[dict[str, float]]:
    newest = rundir.attempt_directory(job.run, rundir.attempt_numbers(job.run)[-1])
    return [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]


def test_pairs_stay_together_in_every_micro_batch(alone: Job) -> None:
    lengths = Documents.open(alone.store / "data/tiny" / TRAINING).lengths
    for bins in (1, 2):
        schedule = Schedule(lengths, alone.plan.prepared.hyperparameters, bins, unit=2)
        steps = range(schedule.steps_per_epoch)
        groups = [group for step in steps for group in schedule.micro_batches(step)]
        assert all(second == first + 1 for group in groups for first, second in zip(group[::2], group[1::2], strict=True))
        assert sorted(document for group in groups for document in group) == list(range(len(lengths)))


def test_it_begins_at_the_reference_and_learns_to_prefer(alone: Job) -> None:
    lines = metrics(alone)
    steps = [line for line in lines if "train_loss" in line]
    held_out = [line for line in lines if "validation_loss" in line]
    assert held_out[0]["step"] == 0
    assert held_out[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(steps[0]["reward_margin"]) < 1e-4
    assert steps[-1]["train_loss"] < 0.6
    assert steps[-1]["reward_margin"] > 0.1
    assert steps[-1]["reward_accuracy"] == 1
    assert {"validation_loss", "validation_reward_margin", "validation_reward_accuracy"} <= held_out[-1].keys()
    (result,) = alone.results()
    assert result.metrics.validation_loss_before == pytest.approx(held_out[0]["validation_loss"])
    assert result.metrics.validation_loss_after == pytest.approx(held_out[-1]["validation_loss"])


def test_the_progress_tells_how_many_pairs_are_right(alone: Job) -> None:
    progress = json.loads((alone.run / "status/rank-0.json").read_text())
    assert progress["rewardAccuracy"] == 1
    assert progress["rewardMargin"] > 0.1


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_reference_and_adapter(alone: Job, world: int) -> None:
    job = train(alone.again(f"world-{world}"), world)
    assert references(job) == references(alone)
    assert len(references(job)) == 2
    assert job.adapter() == alone.adapter()


@pytest.mark.parametrize("moment", ["reference", "step"])
@pytest.mark.parametrize("worlds", [(1, 1), (2, 1)])
def test_killed_at_any_moment_gives_the_same_adapter(alone: Job, moment: str, worlds: tuple[int, int]) -> None:
    """While the reference is computed or between steps; then another number of ranks goes on."""
    job = alone.again(f"killed-{moment}-{worlds[0]}")
    gang = Gang(job, worlds[0])
    if moment == "reference":
        gang.until(lambda: bool(rundir.attempt_numbers(job.run)))
    else:
        gang.until(lambda: gang.steps() >= 4 and any((job.run / "checkpoints").glob("*/MANIFEST.json")))
    gang.processes[-1].kill()
    gang.wait()
    train(job, worlds[1])
    assert references(job) == references(alone)
    assert job.adapter() == alone.adapter()
    assert (job.results()[0].from_step > 0) == (moment == "step")
    assert job.results()[0].metrics.validation_loss_before == alone.results()[0].metrics.validation_loss_before


def test_a_resumed_attempt_reads_the_reference(alone: Job) -> None:
    """What an attempt scores lies under its number: the second one wrote nothing."""
    job = alone.again("read")
    gang = Gang(job)
    gang.until(lambda: gang.steps() >= 4 and any((job.run / "checkpoints").glob("*/MANIFEST.json")))
    gang.processes[0].kill()
    gang.wait()
    train(job)
    assert {folder.suffix for folder in job.run.glob("reference/*/*")} == {".a1"}


def test_a_stop_while_the_reference_is_computed_is_a_stop(alone: Job) -> None:
    job = alone.again("stopped")
    gang = Gang(job)
    gang.until(lambda: bool(rundir.attempt_numbers(job.run)))
    gang.processes[0].terminate()
    assert gang.wait() == [143]
    assert job.results()[0].outcome == "Stopped"
    train(job)
    assert job.adapter() == alone.adapter()


def test_accumulated_rows_equal_one_document_a_forward(alone: Job) -> None:
    """Other micro-batches, no patches: the same training but for rounding."""
    prepared = alone.plan.prepared.model_copy(
        update={"packing": ResolvedPacking(mode="OneDocument", reason="asked", patches=[]), "bins_per_micro_batch": 4}
    )
    single = alone.again("single")
    single = Job(single.store, single.plan.model_copy(update={"prepared": prepared}), single.environment)
    single.plan_file.write_text(single.plan.model_dump_json(by_alias=True, exclude_none=True))
    train(single)
    found, expected = (json.loads(step_lines(job)[-1]) for job in (single, alone))
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert found["reward_margin"] == pytest.approx(expected["reward_margin"], rel=1e-3)


def test_it_finishes_in_an_adapter_with_its_proof(alone: Job) -> None:
    adapter = filed(alone)
    folder: Path = alone.store / adapter.sub_path
    proof = Proof.model_validate_json((folder / "proof.json").read_bytes())
    assert all(text.base != pytest.approx(text.tuned, abs=1e-3) for text in proof.texts)
