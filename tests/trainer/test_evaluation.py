"""`evaluation`: patience and the best state, and answers to held-out prompts; under kills and with several ranks too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from tests.serving.tiny import make_model as make_byte_model
from tests.trainer.jobs import Gang, Job, make_data, make_job, make_pairs, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneward_api import manifest
from tuneward_api.evaluation import Task
from tuneward_trainer import rundir, task
from tuneward_trainer.best import Best
from tuneward_trainer.data.documents import TRAINING, VALIDATION, Documents, DocumentWriter
from tuneward_trainer.distributed import Gang as Ranks
from tuneward_trainer.evaluate import StoppedError

HELD_OUT = {"training": [{"uri": "pvc://claim/chats.jsonl"}], "validationFraction": 0.1}
ALONE = Ranks(0, 1, torch.device("cpu"))

# -- the best state --------------------------------------------------------------------------------------------------


def test_the_lowest_loss_is_best_and_patience_counts_what_is_not_lower() -> None:
    best = Best(2)
    seen = [(step, best.see(step, loss), best.spent) for step, loss in enumerate([3.0, 2.0, 2.0, 1.5, 1.6, 1.5], start=1)]
    assert seen == [
        (1, True, False),
        (2, True, False),
        (3, False, False),
        (4, True, False),
        (5, False, False),
        (6, False, True),
    ]
    assert (best.step, best.loss) == (4, 1.5)
    assert Best.resumed(2, best.notes()) == best


def test_without_patience_nothing_is_ever_spent() -> None:
    best = Best.resumed(None, {"best_step": 3.0})
    assert (best.step, best.notes(), best.spent) == (None, {}, False)
    assert best.loss == math.inf


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Overfits random documents: the held-out loss falls first, and rises then."""
    evaluation = {"everySteps": 1, "patience": 2}
    spec = {"evaluation": evaluation, "datasets": HELD_OUT, "checkpoint": {"everySteps": 100, "keep": 1}}
    hyper = {"steps": 30, "learning_rate": 2e-2, "scheduler": "Constant", "warmup_fraction": 0.0}
    return train(make_job(tmp_path_factory.mktemp("impatient"), spec=spec, hyper=hyper))


def losses(job: Job) -> dict[int, float]:
    """Step -> validation loss, over all attempts."""
    found: dict[int, float] = {}
    for number in rundir.attempt_numbers(job.run):
        lines = (rundir.attempt_directory(job.run, number) / "metrics.jsonl").read_text().splitlines()
        found |= {line["step"]: line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line}
    return found


def test_training_ends_when_patience_is_spent_and_the_best_state_is_the_result(impatient: Job) -> None:
    measured = losses(impatient)
    last = max(measured)
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert 0 < best == last - 2 < 28
    (result,) = impatient.results()
    assert (result.outcome, result.step, result.metrics.steps) == ("Succeeded", best, best)
    assert result.metrics.validation_loss_after == measured[best]
    assert result.message == f"trained {last} steps; step {best} had the lowest validation loss and is the result"
    (saved,) = impatient.run.glob(f"checkpoints/step-{best:08d}.a*/state.safetensors")
    state = load_file(saved)
    for name, tensor in load(impatient.adapter()).items():
        assert torch.equal(tensor, state[name.replace(".weight", ".default.weight")])


def test_where_the_best_state_could_not_be_written_the_last_one_is_the_result(impatient: Job) -> None:
    """Every further attempt would miss it again, and the job would end in nothing."""
    job, best = impatient.again("full"), impatient.results()[0].step
    (job.run / f"checkpoints/step-{best:08d}.a1/state.safetensors").mkdir(parents=True)
    (result,) = train(job).results()
    last = max(losses(job))
    assert (result.outcome, result.step) == ("Succeeded", last)
    assert result.metrics.validation_loss_after == losses(impatient)[last]
    assert result.message == (
        f"trained {last} steps; step {best} had a lower validation loss, but its checkpoint is not there (was the store "
        "full?): the last state is the result"
    )


def test_two_ranks_find_the_same_best_state(impatient: Job) -> None:
    job = train(impatient.again("two"), 2)
    assert (losses(job), job.adapter()) == (losses(impatient), impatient.adapter())


@pytest.mark.parametrize("after", [0, 1])
def test_a_kill_after_the_best_state_changes_nothing(impatient: Job, after: int) -> None:
    best = impatient.results()[0].step
    job = impatient.again(f"killed-{after}")
    gang = Gang(job, 1)
    gang.until(lambda: gang.steps() >= best + after)
    gang.processes[0].kill()
    gang.wait()
    train(job)
    assert job.adapter() == impatient.adapter()
    assert job.results()[0].step == best


# -- answers ---------------------------------------------------------------------------------------------------------


def talks(store: Path) -> None:
    """A model of bytes, and data that teach it to say ab after a question and cd after another."""
    model = make_byte_model(store / "models/tiny")
    manifest.write_manifest(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.eos_token_id
    for part in (TRAINING, VALIDATION):
        with DocumentWriter(store / "data/tiny" / part, ["pvc://claim/chats.jsonl"]) as writer:
            for line, (asked, said) in enumerate([("First?", "ab"), ("Next?", "cd")], start=1):
                prompt = tokenizer(asked, add_special_tokens=False).input_ids
                answer = [*tokenizer(said, add_special_tokens=False).input_ids, end]
                weights = [0.0] * len(prompt) + [1.0] * len(answer)
                writer.add([*prompt, *answer], weights, file=0, line=line)
    manifest.write_manifest(store / "data/tiny")


TALK = {"datasets": HELD_OUT, "evaluation": {"task": {"grader": "Exact", "maxTokens": 8}}}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Job:
    store = tmp_path_factory.mktemp("talking")
    talks(store)
    hyper = {"steps": 40, "learning_rate": 2e-2, "batch_tokens": 64, "scheduler": "Constant", "warmup_fraction": 0.0}
    return train(make_job(store, spec=TALK, hyper=hyper))


def generations(job: Job) -> list[dict[str, Any]]:
    found = []
    for number in rundir.attempt_numbers(job.run):
        file = rundir.attempt_directory(job.run, number) / task.FILE
        found += [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return found


def test_answers_are_asked_before_and_after_and_graded(talking: Job) -> None:
    metrics = talking.results()[0].metrics
    assert (metrics.task_score_before, metrics.task_score_after) == (0.0, 1.0)
    assert metrics.validation_accuracy_before is not None
    assert (metrics.validation_accuracy_before < 0.5, metrics.validation_accuracy_after) == (True, 1.0)
    asked = generations(talking)
    assert [(one["model"], one["line"], one["right"]) for one in asked] == [
        ("base", 1, False),
        ("base", 2, False),
        ("tuned", 1, True),
        ("tuned", 2, True),
    ]
    assert asked[2] | {"prompt": "First?", "expected": "ab", "answer": "ab"} == asked[2]


def test_two_ranks_write_the_same_answers(talking: Job) -> None:
    job = train(talking.again("two"), 2)
    assert generations(job) == generations(talking)
    assert job.adapter() == talking.adapter()


def test_a_resumed_attempt_knows_the_score_of_before(talking: Job) -> None:
    job = talking.again("resumed")
    gang = Gang(job, 1)
    gang.until(lambda: gang.steps() >= 5)
    gang.processes[0].terminate()
    assert gang.wait() == [143]
    train(job)
    assert job.results()[0].metrics.task_score_before == 0.0
    assert [one["model"] for one in generations(job)] == ["base", "base", "tuned", "tuned"]
    assert job.adapter() == talking.adapter()


def document(weights: list[float]) -> Any:
    return type("D", (), {"weights": torch.tensor(weights).numpy()})()


@pytest.mark.parametrize(
    ("weights", "start"),
    [([0, 0, 1, 1], 2), ([0, 1, 0, 1, 1], 3), ([0, 1, 1], 1), ([0, 0], 0), ([0, 1, 0, 0], 1)],
)
def test_what_is_learnt_last_is_the_answer(weights: list[float], start: int) -> None:
    assert task.answer_start(document(weights)) == start


def test_samples_are_spread_over_all(tmp_path: Path) -> None:
    documents = Documents.open(make_data(tmp_path, validation=10) / VALIDATION)
    assert task.chosen(documents, Task(samples=4)) == [0, 2, 5, 7]
    assert task.chosen(documents, Task()) == list(range(10))


def test_of_a_pair_the_better_answer_is_what_is_expected(tmp_path: Path) -> None:
    pairs = Documents.open(make_pairs(tmp_path, validation=3, copies=1) / VALIDATION)
    assert task.chosen(pairs, Task(), unit=2) == [0, 2, 4]


def test_a_stop_in_the_middle_gives_no_score(talking: Job) -> None:
    folder = talking.store / "models/tiny"
    documents = Documents.open(talking.store / "data/tiny" / VALIDATION)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(StoppedError):
        task.answers(
            model, AutoTokenizer.from_pretrained(folder), documents, Task(max_tokens=2), ALONE, unit=1, stopping=lambda: True
        )
