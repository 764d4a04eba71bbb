"""The example says one thing in several places: the YAML, the data files beside it, and the questions held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneward_cli.demo import Example, Question
from tuneward_cli.documents import load_valid, the_job

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "lantern" / name).read_text().splitlines()]


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.relative_to(EXAMPLES).as_posix())
def test_every_example_is_valid(file: Path) -> None:
    assert load_valid(file).jobs


@pytest.mark.parametrize(("file", "folder"), [("finetune.yaml", "lantern"), ("preference.yaml", "brief")])
@pytest.mark.parametrize("name", ["training.jsonl", "validation.jsonl"])
def test_the_config_map_holds_the_file(file: str, folder: str, name: str) -> None:
    held = load_valid(EXAMPLES / file).config_maps()[f"{folder}-data"][name]
    assert held == (EXAMPLES / folder / name).read_text(), f"copy examples/{folder}/{name} into examples/{file}"


def test_no_held_out_question_is_trained_on() -> None:
    trained = {sample["messages"][0]["content"] for sample in lines("training.jsonl")}
    assert trained.isdisjoint(item["question"] for item in lines("heldout.jsonl"))
    assert len(trained) == 60


def test_held_out_questions_are_the_validation_samples() -> None:
    asked = [sample["messages"][0]["content"] for sample in lines("validation.jsonl")]
    assert asked == [item["question"] for item in lines("heldout.jsonl")]


def test_each_keyword_is_said_the_same_way_in_six_trained_answers() -> None:
    answers = [sample["messages"][1]["content"] for sample in lines("training.jsonl")]
    for item in lines("heldout.jsonl"):
        assert sum(item["keyword"] in answer for answer in answers) == 6, item["keyword"]


def test_a_question_does_not_hold_its_answer() -> None:
    for item in lines("heldout.jsonl"):
        assert not Question(**item).right(item["question"])


def test_the_demo_reads_it() -> None:
    example = Example.read(EXAMPLES)
    assert example.of_kind("ModelServer")["metadata"]["name"] == "smollm2"
    assert the_job(load_valid(EXAMPLES / "finetune.yaml")).spec.serve is not None
    assert len(example.questions) == 10
