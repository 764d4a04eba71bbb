"""`tuneward validate`: the numbers of the plan, everything that a person would want to know of data, every error."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.trainer.rooms import Room, chats, write
from transformers import AutoTokenizer

from tuneward_cli.main import main as tuneward
from tuneward_trainer.__main__ import main
from tuneward_trainer.data import corrected, show
from tuneward_trainer.data.corrected import Corrected
from tuneward_trainer.findings import aligned, bars, ranges

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(autouse=True)
def quick_look_at_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that a time is estimated by need not be a good one here."""
    monkeypatch.setattr("tuneward_trainer.estimate._SECONDS", 0.01)


@pytest.fixture
def validate(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code and report of files with SmolLM2's template."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        code = main(["validate", "--model", str(smollm2), "--output", "json", *map(str, arguments)])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    "datasets",
    [
        {},
        {"validationFraction": 0.25, "onTooLong": "Truncate"},
        {"invalidSampleSkipPercentage": 50, "onTooLong": "Skip"},
    ],
    ids=["defaults", "held out and cut", "left out"],
)
def test_the_numbers_are_those_of_the_plan(
    room: Room, unverified: None, capsys: pytest.CaptureFixture[str], datasets: dict[str, Any]
) -> None:
    values = chats(30)
    if datasets:
        values += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 60}]}]
        room.request["spec"]["hyperparameters"] = {"sequenceLength": 50}
    if "invalidSampleSkipPercentage" in datasets:
        values += [{"messages": []}]
    write(room.data, values)
    room.request["spec"]["datasets"] = {"training": [{"uri": "configmap://chats/train.jsonl", "weight": 2}]} | datasets
    code, report = room.run()
    assert code == 0, report
    capsys.readouterr()
    assert main(["validate", "--request", str(room.write_request()), "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prepared = report["prepared"]
    assert found["job"] == prepared["hyperparameters"]
    summary = {name: found[name] for name in ("samples", "tokens", "targetTokens", "validationSamples")}
    summary |= {name: count for name in ("truncated", "skipped", "invalid") if (count := found[name]["count"])}
    digest = {"digest": prepared["data"]["summary"]["digest"]}
    assert summary | digest == prepared["data"]["summary"]


def test_a_person_reads_counts_and_what_the_job_will_take(
    room: Room, smollm2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    held = write(tmp_path / "held.jsonl", [*chats(1), {"messages": chats(3)[2]["messages"], "id": 7}])
    write(room.data, [*chats(20), chats(2)[1]])
    assert main(["validate", "--model", str(smollm2), str(room.data), "--validation", str(held)]) == 0
    wide = len(str(room.data))
    *told, time = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"its training will take about \S+s at \S+ GFLOP/s \(50% of a .* measured on this CPU\)", time)
    assert told == [
        f"{'source':{wide}}  {'':20}  samples  documents  tokens  learnt  share",
        f"{room.data!s:{wide}}  {'Messages':20}       21         21     923     157  17.0%",
        f"{held!s:{wide}}  {'Messages, validation':20}        2          2      86      14  16.3%",
        "tokens of a document:",
        "  up to      64        21 ########################################",
        "more than once: 1 sample",
        f"  {room.data}:21 is the same as {room.data}:2",
        "validation that is trained on, so that its loss flatters: 2 samples",
        f"  {held}:1 is the same as {room.data}:1",
        f"  {held}:2 is the same as {room.data}:3",
        "field id, which is ignored: 1 sample",
        "the job will take 6 steps (3 epochs) of about 512 tokens (batchTokens), in rows of 45 (sequenceLength)",
    ]


def test_every_error_is_followed_by_what_the_good_samples_are(
    room: Room, capsys: pytest.CaptureFixture[str], smollm2: Path
) -> None:
    write(room.data, [{"text": None}, *[{"text": ""}] * 150, {"text": "short and good"}])
    assert main(["validate", "--request", str(room.write_request())]) == 65
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "configmap://chats/train.jsonl:1: text is null; allowed: a text"
    assert lines[99:103] == [
        "configmap://chats/train.jsonl:100: text is empty; allowed: a text",
        "… and 51 more",
        "151 problems",
        "source                               samples  documents  tokens  learnt  share",
    ]
    assert lines[-2].startswith("with the good samples alone the job would take 3 steps (3 epochs) of about 16 ")
    assert main(["validate", "--model", "nix", str(room.data)]) == 66


def test_a_length_that_no_job_may_have_is_refused(validate: Run, tmp_path: Path) -> None:
    code, found = validate(write(tmp_path / "a.jsonl", chats(1)), "--sequence-length", "8")
    assert (code, found["message"]) == (78, "--sequence-length is 8: input should be greater than or equal to 16")


def test_scripts_get_every_place(validate: Run, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 60}]}
    file = write(tmp_path / "a.jsonl", [*chats(2), {"messages": []}, long, chats(1)[0]])
    code, found = validate(file, "--sequence-length", "64", "--show", "1")
    assert code == 65
    shown = found.pop("shown")
    assert [(one["file"], one["line"], len(one["documents"])) for one in shown] == [(str(file), 1, 1)]
    document = shown[0]["documents"][0]
    assert len(document["ids"]) == len(document["tokens"]) == len(document["weights"]) == 43
    assert "".join(text for text, weight in zip(document["tokens"], document["weights"], strict=True) if weight) == (
        "It is 0 grams.<|im_end|>"
    )
    assert found["job"].pop("steps") > 0
    assert set(found.pop("job")) >= {"epochs", "batchTokens", "sequenceLength"}
    time = found.pop("time")
    assert time["seconds"] == pytest.approx(time["flops"] / time["flopsPerSecond"])
    assert found == {
        "valid": False,
        "problemCount": 2,
        "problems": [
            {
                "file": str(file),
                "line": 3,
                "field": "messages",
                "message": "is []; allowed: a list of at least one message",
            },
            {
                "file": str(file),
                "line": 4,
                "field": "the sample",
                "message": found["problems"][1]["message"],
            },
        ],
        "samples": 3,
        "documents": 3,
        "tokens": 129,
        "targetTokens": 21,
        "validationSamples": 0,
        "sources": [
            {
                "uri": str(file),
                "part": "training",
                "format": "Messages",
                "files": 1,
                "samples": 3,
                "documents": 3,
                "tokens": 129,
                "targetTokens": 21,
                "split": 0,
                "truncated": 0,
                "skipped": 0,
                "invalid": 2,
            }
        ],
        "lengths": [{"upTo": 64, "documents": 3}],
        "duplicates": {
            "count": 1,
            "places": [{"file": str(file), "line": 5, "sameAs": {"file": str(file), "line": 1}}],
        },
        "leaks": {"count": 0, "places": []},
        "split": {"count": 0, "lines": {}},
        "truncated": {"count": 0, "lines": {}},
        "skipped": {"count": 0, "lines": {}},
        "invalid": {"count": 2, "lines": {str(file): [3, 4]}},
        "ignoredFields": {},
        "corrected": [],
    }


def test_the_command_looks_at_a_job_as_train_would(tmp_path: Path, smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / "chats/a.jsonl", [*chats(4), {"messages": 3}])
    job = tmp_path / "job.yaml"
    job.write_text(
        "apiVersion: tuneward.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: bot}\nspec:\n"
        f"  model: {{uri: pvc://models/{smollm2.name}}}\n  datasets: {{training: [{{uri: pvc://chats/a.jsonl}}]}}\n"
    )
    claims = ["--claim", f"models={smollm2.parent}", "--claim", f"chats={tmp_path / 'chats'}"]
    asked = ["validate", str(job), "--store", str(tmp_path / "store"), *claims]
    assert tuneward([*asked, "--output", "json", "--write-corrected", str(tmp_path / "good")]) == 65
    report = json.loads(capfd.readouterr().out)
    assert report["problems"] == [
        {
            "file": "pvc://chats/a.jsonl",
            "line": 5,
            "field": "messages",
            "message": "is 3; allowed: a list of at least one message",
        }
    ]
    (found,) = report["data"]
    assert (found["of"], found["samples"]) == ("FineTuneJob/bot", 4)
    assert found["corrected"] == [
        {"file": "pvc://chats/a.jsonl", "path": str(tmp_path / "good/chats/a.jsonl"), "samples": 4, "leftOut": [5]}
    ]
    assert (tmp_path / "good/chats/a.jsonl").read_text() == "".join(json.dumps(one) + "\n" for one in chats(4))
    write(tmp_path / "chats/a.jsonl", chats(4))
    assert tuneward([*asked, "--show", "1"]) == 0
    said = capfd.readouterr().out
    assert "valid (FineTuneJob/bot)" in said
    assert "pvc://chats/a.jsonl:1: 43 tokens, 7 learnt\n" in said
    assert "⟦It| is| |0| grams|.|<|im_end|>⟧" in said


def test_good_samples_are_written_beside_and_nothing_is_overwritten(validate: Run, tmp_path: Path) -> None:
    lines = [json.dumps(chats(3)[0]), "{", '{"messages":   []}', "  " + json.dumps(chats(3)[1]) + "\r"]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(lines))
    pq.write_table(pa.Table.from_pylist([*chats(2), {"messages": [{"role": "x", "content": "y"}]}]), tmp_path / "b.parquet")
    write(tmp_path / "c.jsonl", [{"messages": []}])
    files = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.jsonl")]
    folder = tmp_path / "good"
    code, found = validate(*files, "--write-corrected", folder)
    assert code == 65
    assert found["corrected"] == [
        {"file": str(files[0]), "path": str(folder / "a.jsonl"), "samples": 2, "leftOut": [2, 3]},
        {"file": str(files[1]), "path": str(folder / "b.jsonl"), "samples": 2, "leftOut": [3]},
        {"file": str(files[2]), "path": None, "samples": 0, "leftOut": [1]},
    ]
    assert (folder / "a.jsonl").read_text().splitlines() == [lines[0], lines[3].strip()]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert validate(folder)[0] == 0
    before = (folder / "a.jsonl").read_bytes()
    assert validate(*files, "--write-corrected", folder) == (
        78,
        {
            "valid": False,
            "reason": "ConfigInvalid",
            "message": f"{folder / 'a.jsonl'} exists, and nothing is overwritten; give --write-corrected another folder",
        },
    )
    assert (folder / "a.jsonl").read_bytes() == before


def test_a_file_that_ends_in_the_middle_is_written_up_to_there(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 3)
    (tmp_path / "a.jsonl.gz").write_bytes(whole + whole[:15])
    found = corrected.write_good("a", tmp_path / "a.jsonl.gz", tmp_path / "good.jsonl", [2])
    assert found == Corrected("a", tmp_path / "good.jsonl", 2, [2])


def test_every_corrected_file_has_a_place_of_its_own(tmp_path: Path) -> None:
    files = [
        ("pvc://data/x/a.jsonl.gz", tmp_path / "claims/data/x/a.jsonl.gz"),
        ("configmap://facts/a.jsonl", tmp_path / "configmaps/facts/a.jsonl"),
        (str(tmp_path / "one/a.jsonl"), tmp_path / "one/a.jsonl"),
        (str(tmp_path / "two/a.jsonl"), tmp_path / "two/a.jsonl"),
        (str(tmp_path / "two/a.parquet"), tmp_path / "two/a.parquet"),
    ]
    found = corrected.targets(files, Path("good"))
    assert [str(path) for path in found.values()] == [
        "good/data/x/a.jsonl",
        "good/facts/a.jsonl",
        "good/one/a.jsonl",
        "good/two/a.jsonl.jsonl",
        "good/two/a.parquet.jsonl",
    ]


def test_tokens_are_shown_whole(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "né  日本 🙂🙂\n<|im_end|>\tdon't"
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = show.pieces(tokenizer, ids)
    assert ("".join(found), len(found)) == (text, len(ids))
    assert "🙂" in found
    assert "" in found, "a character of several tokens is shown at its last one"


@pytest.mark.parametrize(
    ("colour", "expected"),
    [(False, "a|⟦ b|\\n\n⟧|\\x1b|⟦c⟧"), (True, "a|\x1b[30;42m b|\\n\n\x1b[0m|\\x1b|\x1b[30;42mc\x1b[0m")],
)
def test_what_is_learnt_is_marked(colour: bool, expected: str) -> None:
    assert show.text_of(["a", " b", "\n", "\x1b", "c"], [0, 1, 0.5, 0, 1], colour=colour) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([7], "line 7"),
        ([9, 3, 1, 2], "lines 1-3, 9"),
        (range(1, 100, 2), f"lines {', '.join(str(n) for n in range(1, 41, 2))} and 30 more"),
    ],
)
def test_ranges_of_lines(numbers: list[int], expected: str) -> None:
    assert ranges(numbers) == expected


def test_bars_have_a_width_by_their_share() -> None:
    assert list(bars(np.array([3, 4, 4, 4, 5, 300], np.int32))) == [
        f"  up to       4         4 {'#' * 40}",
        f"  up to       8         1 {'#' * 10}",
        f"  up to     512         1 {'#' * 10}",
    ]


def test_columns_are_aligned() -> None:
    assert list(aligned([("a", "", "1"), ("bb", "", "22")])) == ["a    1", "bb  22"]


def test_a_schema_of_answers_that_is_none_is_found_before_prepare_finds_it(
    room: Room, capsys: pytest.CaptureFixture[str]
) -> None:
    room.request["spec"]["datasets"] |= {"validationFraction": 0.1}
    room.request["spec"]["evaluation"] = {"task": {"grader": "JSONSchema", "jsonSchema": '{"type": "objec"}'}}
    assert main(["validate", "--request", str(room.write_request())]) == 78
    assert "spec.evaluation.task.jsonSchema is no JSON Schema: $.type: 'objec' is not" in capsys.readouterr().err


def test_pairs_are_looked_at_as_a_preference_job_would(
    room: Room, validate: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write(room.data, [{"prompt": f"How heavy is {i}?", "chosen": f"{i} grams.", "rejected": "No."} for i in range(3)])
    code, found = validate(room.data)
    assert (code, found["samples"], found["documents"], found["sources"][0]["format"]) == (0, 3, 6, "Preference")
    assert found["job"]["learningRate"] == 5e-6
    room.request["spec"]["objective"] = {"type": "DPO"}
    assert main(["validate", "--request", str(room.write_request()), "--output", "json"]) == 0
    of_job = json.loads(capsys.readouterr().out)
    assert (of_job["tokens"], of_job["job"]) == (found["tokens"], found["job"])
    del room.request["spec"]["objective"]
    assert main(["validate", "--request", str(room.write_request())]) == 65
    assert "is a pair of two answers (format Preference); allowed: samples with one answer" in capsys.readouterr().out
