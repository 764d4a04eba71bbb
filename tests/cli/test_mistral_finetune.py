"""mistral-finetune's YAML: what each key becomes, what is said of those that become nothing, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneward_cli.documents import Loaded, load, the_job
from tuneward_cli.main import main
from tuneward_cli.mistral_finetune import Source, copies_of, job_name

EXAMPLE = """\
# as its example/7B.yaml, filled in
data:
  instruct_data: "{root}/chats.jsonl"
  data: ""
  eval_instruct_data: "{root}/held.jsonl"

model_id_or_path: "{root}/models/mistral-7b"
lora:
  rank: 64

seq_len: 32768
batch_size: 1
max_steps: 300
optim:
  lr: 6.e-5
  weight_decay: 0.1
  pct_start: 0.05

seed: 0
log_freq: 1
eval_freq: 100
no_eval: False
ckpt_freq: 100

save_adapters: True

run_dir: "/runs/My_First Run"

wandb:
  project: ""
  run_name: ""
  offline: False
"""
LAYOUT = "model_id_or_path: the folder must have Hugging Face's layout (config.json); prompts are rendered by its own chat template"
CUT = "seq_len: what is longer is cut at its end; mistral-finetune goes on with it in the next row"
WARMUP = "optim.pct_start: warm-up is linear from 0, then a cosine to a tenth; OneCycleLR begins at a 25th, ends near 0"
METRICS = "every step is written to attempts/<n>/metrics.jsonl of the run directory"
WANDB = "wandb: the run is named after the job; set WANDB_API_KEY; no key is read from here"


def tokens(count: int) -> str:
    return (
        f"batch_size: a step has {count} tokens (seq_len x batch_size x num_microbatches) on any number of workers; "
        "mistral-finetune multiplies them by its GPUs"
    )


def loaded(folder: Path, text: str) -> Loaded:
    file = folder / "mistral.yaml"
    file.write_text(text.replace("{root}", str(folder)))
    return load(file)


def spec_of(found: Loaded) -> dict[str, Any]:
    assert found.problems == []
    return the_job(found).spec.to_json()


def test_its_example_is_a_job(tmp_path: Path) -> None:
    (tmp_path / "models/mistral-7b").mkdir(parents=True)
    found = loaded(tmp_path, EXAMPLE)
    assert spec_of(found) == {
        "model": {"uri": "pvc://model/mistral-7b"},
        "datasets": {
            "training": [{"uri": "pvc://data/chats.jsonl"}],
            "validation": [{"uri": "pvc://data/held.jsonl"}],
            "onTooLong": "Truncate",
        },
        "method": {"rank": 64, "alpha": 128.0, "dropout": 0.0},
        "hyperparameters": {
            "steps": 300,
            "learningRate": 6e-5,
            "warmupFraction": 0.05,
            "weightDecay": 0.1,
            "maxGradNorm": 1.0,
            "sequenceLength": 32768,
            "batchTokens": 32768,
            "seed": 0,
        },
        "checkpoint": {"everySteps": 100, "keep": 3},
        "evaluation": {"everySteps": 100},
    }
    assert the_job(found).metadata == {"name": "my-first-run"}
    assert found.claims == {"model": tmp_path / "models", "data": tmp_path}
    assert found.notes == [
        LAYOUT,
        CUT,
        tokens(32768),
        WARMUP,
        f"log_freq: {METRICS}",
        "run_dir: the run directory is jobs/my-first-run of the store",
    ]


def test_what_is_left_out_has_its_defaults(tmp_path: Path) -> None:
    text = "data: {data: '{root}/books'}\nmodel_id_or_path: mistralai/Mistral-7B-v0.3\nrun_dir: 7b\n"
    found = loaded(tmp_path, text)
    assert spec_of(found) == {
        "model": {"uri": "hf://mistralai/Mistral-7B-v0.3"},
        "datasets": {"training": [{"uri": "pvc://data/books", "format": "Text"}]},
        "objective": {"type": "Pretraining"},
        "method": {"rank": 16, "alpha": 32.0, "dropout": 0.0},
        "hyperparameters": {
            "steps": 100,
            "learningRate": 3e-4,
            "warmupFraction": 0.3,
            "weightDecay": 0.1,
            "maxGradNorm": 1.0,
            "sequenceLength": 2048,
            "batchTokens": 2048,
            "seed": 0,
        },
        "checkpoint": {"keep": 3},
    }
    assert found.notes == [
        "model_id_or_path: mistralai/Mistral-7B-v0.3 is no folder here, so the model of that name on the hub is taken",
        LAYOUT,
        tokens(2048),
        WARMUP,
        "ckpt_freq: a checkpoint is saved every 300 seconds, so that a killed job goes on",
        "run_dir: the run directory is jobs/run-7b of the store",
    ]


EVERYTHING = """\
data:
  instruct_data: "{root}/a.jsonl:0.75, {root}/b/c.jsonl:0.25"
  data: "{root}/books.jsonl:1"
  eval_instruct_data: "{root}/held.jsonl"
  shuffle: true
  instruct: {shuffle: true}
model_id_or_path: "{root}/m"
run_dir: run
num_microbatches: 2
batch_size: 4
seq_len: 64
no_ckpt: true
num_ckpt_keep: null
save_adapters: false
checkpoint: true
log_freq: 5
mlflow: {tracking_uri: http://x, experiment_name: y}
wandb: {project: z, key: secret}
lora: {rank: 8, scaling: 0.5, dropout: 0.1}
"""


def test_every_key_is_taken_or_told_of(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "b").mkdir()
    for name, size in (("a.jsonl", 1000), ("b/c.jsonl", 1000), ("books.jsonl", 4000)):
        (tmp_path / name).write_bytes(b"x" * size)
    found = loaded(tmp_path, EVERYTHING)
    spec = spec_of(found)
    assert spec["datasets"] == {
        "training": [
            {"uri": "pvc://model/books.jsonl", "format": "Text"},
            {"uri": "pvc://model/a.jsonl", "weight": 3},
            {"uri": "pvc://data/c.jsonl"},
        ],
        "onTooLong": "Truncate",
    }
    assert spec["method"] == {"rank": 8, "alpha": 4.0, "dropout": 0.1}
    assert spec["checkpoint"] == {"keep": 100}
    assert spec["trackers"] == {"wandb": {"project": "z"}, "mlflow": {"trackingUri": "http://x", "experiment": "y"}}
    assert spec["hyperparameters"]["batchTokens"] == 512
    assert found.notes == [
        LAYOUT,
        f"data: weights become copies in an epoch, by the sizes of the files: {tmp_path}/books.jsonl 1, {tmp_path}/a.jsonl 3, "
        f"{tmp_path}/b/c.jsonl 1",
        CUT,
        "data.eval_instruct_data: not read, as no_eval is true",
        tokens(512),
        WARMUP,
        "ckpt_freq: a checkpoint is saved every 300 seconds, so that a killed job goes on",
        "num_ckpt_keep: the newest 100 are kept",
        "save_adapters: the adapter is saved by itself; it is not merged into the model",
        WANDB,
        f"log_freq: {METRICS}",
        "checkpoint: whether activations are computed again is not chosen by hand",
        "data.shuffle: samples are always shuffled, by the seed",
        "data.instruct: samples are always shuffled, by the seed; every call of a conversation is learnt in its place",
        "run_dir: the run directory is jobs/run of the store",
    ]


GOOD = "data:\n  instruct_data: a.jsonl\nmodel_id_or_path: models/m/n\nrun_dir: run\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "lr: 1\n", ":5: lr: unknown field; allowed here: data, model_id_or_path, run_dir, optim,"),
        (GOOD + "optim:\n  learning_rate: 1\n", ":6: optim.learning_rate: unknown field; allowed here: lr, weight_decay, pct_start"),
        (GOOD + "seq_len: '64'\n", ':5: seq_len: "64": must be a whole number'),
        (GOOD + "max_steps: 0\n", ":5: max_steps: becomes spec.hyperparameters.steps: 0: must be at least 1"),
        (GOOD + "seed: 1\noptim:\n  lr: 2\n", ":7: optim.lr: becomes spec.hyperparameters.learningRate: 2.0: must be at most 1"),
        (GOOD + "no_eval: false\n", ":5: no_eval: is false, so data.eval_instruct_data must name data; or set no_eval: true"),
        (GOOD.replace("a.jsonl", "''"), ":1: data: holds no training data; set instruct_data, or data for plain text"),
        (GOOD.replace("a.jsonl", "a.jsonl:x"), ":2: data.instruct_data: 'a.jsonl:x' must be PATH or PATH:WEIGHT with a weight"),
        (GOOD.replace("a.jsonl", "a.jsonl,a.jsonl"), ":2: data.instruct_data: a.jsonl is there twice; name it once"),
        (GOOD.replace("a.jsonl", "a b.jsonl"), ":2: data.instruct_data: becomes spec.datasets.training[0].uri: \"pvc://data/a b"),
        (GOOD.replace("run_dir: run\n", ""), ":1: run_dir: required"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (problem,) = loaded(tmp_path, text).problems
    assert str(problem).startswith(f"{tmp_path / 'mistral.yaml'}{expected}")


WRONG = """\
data:
  instruct_data: "a b.jsonl,c.jsonl:x"
  shuffle: 3
lora:
  rank: 0
  dropout: 2
  ranks: x
max_steps: 0
no_eval: false
optim:
  lr: 2
run_dir: 5
"""


def test_all_refusals_come_at_once(tmp_path: Path) -> None:
    """Of keys, of what they say together, and of the job that they become."""
    said = [str(problem).removeprefix(f"{tmp_path / 'mistral.yaml'}:") for problem in loaded(tmp_path, WRONG).problems]
    assert [": ".join(line.split(": ")[:2]) for line in said] == [
        "1: model_id_or_path",
        "2: data.instruct_data",
        "2: data.instruct_data",
        "3: data.shuffle",
        "5: lora.rank",
        "6: lora.dropout",
        "7: lora.ranks",
        "8: max_steps",
        "9: no_eval",
        "11: optim.lr",
        "12: run_dir",
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("data: 3", ["data"]),
        ("data: {data: 3}", ["data.data"]),
        ("data: {instruct_data: 3, eval_instruct_data: a}\nno_eval: false", ["data.instruct_data"]),
        ("data: {instruct_data: a, eval_instruct_data: 3}\nno_eval: false", ["data.eval_instruct_data"]),
        ("data: {}\nno_eval: false\nlora: x", ["data", "no_eval", "lora"]),
        ("no_eval: false", ["data"]),
    ],
)
def test_what_is_refused_is_the_cause_of_no_other_refusal(tmp_path: Path, data: str, expected: list[str]) -> None:
    problems = loaded(tmp_path, f"model_id_or_path: m\nrun_dir: run\n{data}\n").problems
    assert [problem.field for problem in problems] == expected


def test_without_lora_all_weights_are_trained(tmp_path: Path) -> None:
    found = loaded(tmp_path, GOOD + "lora: {enable: false}\n")
    assert not found.problems
    assert found.jobs[0].spec.to_json()["method"] == {"type": "Full"}


def test_validate_says_what_is_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mistral.yaml").write_text(GOOD)
    assert main(["validate", str(tmp_path / "mistral.yaml")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"  {CUT}" in said
    assert f"✓ {tmp_path / 'mistral.yaml'}: valid (FineTuneJob/run)" in said
    (tmp_path / "mistral.yaml").write_text(GOOD + "sed: 3\n")
    assert main(["validate", str(tmp_path / "mistral.yaml")]) == 78


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [("runs/Bot 7", "bot-7"), ("7b/", "run-7b"), ("x" * 60, "x" * 48), ("_", "run"), ("1" * 60, "run-" + "1" * 44)],
)
def test_a_job_is_called_as_its_run_dir_ends(run_dir: str, expected: str) -> None:
    assert job_name(run_dir) == expected


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([100], [0.3], [1]),
        ([100, 100], [1, 1], [1, 1]),
        ([100, 100], [0.7, 0.3], [5, 2]),
        ([1000, 100], [1, 1], [1, 10]),
        ([100, 100], [1.5, 1], [3, 2]),
        ([0, 0], [2, 1], [2, 1]),
    ],
)
def test_weights_become_copies(tmp_path: Path, sizes: list[int], weights: list[float], expected: list[int]) -> None:
    sources = []
    for index, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        (tmp_path / str(index)).write_bytes(b"x" * size)
        sources.append(Source(tmp_path / str(index), weight))
    assert copies_of(sources) == expected
