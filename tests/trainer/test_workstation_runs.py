"""`tuneward train` from data to adapter, on a model of a million random weights: examples, and other programs' YAML."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.trainer.jobs import make_model, tiny_config

from tuneward_cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/chitchat"


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with SmolLM2's tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m-instruct"
    folder.mkdir()
    for file in (*smollm2.glob("*token*"), *smollm2.glob("*.jinja"), *smollm2.glob("generation_config.json")):
        shutil.copy(file, folder)
    return make_model(folder, tiny_config(vocab_size=49_152, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example's script writes, a few conversations of it."""
    folder = tmp_path_factory.mktemp("chitchat")
    command = [sys.executable, str(EXAMPLE / "make.py"), str(folder), "--conversations", "30", "--held-out", "5"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert said == f"{folder}/training.jsonl: 30 conversations\n{folder}/validation.jsonl: 5 conversations\n"
    return folder


def result(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def shapes(adapter: str) -> set[int]:
    """Ranks of the adapter's matrices."""
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        return {file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name}  # noqa: SIM118


def test_conversations_alternate_and_end_in_an_answer(talks: Path) -> None:
    lines = [line for part in ("training", "validation") for line in (talks / f"{part}.jsonl").read_text().splitlines()]
    assert len(set(lines)) == len(lines)
    for line in lines:
        messages = json.loads(line)["messages"]
        assert len(messages) >= 2
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)


def test_real_conversations_are_checked_and_learnt(
    tiny: Path, talks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text((EXAMPLE / "job.yaml").read_text().replace("steps: 20", "steps: 3"))
    store = ["--store", str(tmp_path / "store")]
    where = [str(job), *store, "--claim", f"chitchat={talks}", "--output", "json"]
    assert main(["import", str(tiny), "smollm2-135m-instruct", *store]) == 0
    capfd.readouterr()
    assert main(["validate", *where]) == 0
    (checked,) = result(capfd)["data"]
    assert (checked["samples"], checked["validationSamples"], checked["leaks"]["count"]) == (30, 5, 0)
    assert 0.1 < checked["targetTokens"] / checked["tokens"] < 0.9
    assert checked["job"]["steps"] == 3
    assert main(["train", *where]) == 0
    assert result(capfd)["metrics"]["steps"] == 3


def test_a_yaml_of_mistral_finetune_is_trained(
    tiny: Path, talks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "7B.yaml"
    file.write_text(
        f"data:\n  instruct_data: {talks}/training.jsonl\n  eval_instruct_data: {talks}/validation.jsonl\n"
        f"model_id_or_path: {tiny}\nlora: {{rank: 4}}\nseq_len: 512\nbatch_size: 2\nmax_steps: 3\noptim: {{lr: 6.e-5}}\n"
        f"no_eval: False\nckpt_freq: 2\nrun_dir: {tmp_path}/runs/talk\n"
    )
    assert main(["train", str(file), "--store", str(tmp_path / "store"), "--output", "json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert (found["job"], found["metrics"]["steps"]) == ("talk", 3)
    assert shapes(found["adapter"]) == {4}
    assert "batch_size: a step has 1024 tokens" in said.err
    plan = json.loads((tmp_path / "store/jobs/talk/plan.json").read_text())
    numbers = plan["prepared"]["hyperparameters"]
    assert (numbers["learningRate"], numbers["sequenceLength"], numbers["batchTokens"]) == (6e-5, 512, 1024)
