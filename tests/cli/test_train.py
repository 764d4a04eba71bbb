"""`tuneward train` as a user runs it."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.station import TRAINING, Station, chats
from tests.support.wait import wait_for
from transformers import AutoTokenizer, LlamaForCausalLM

pytestmark = pytest.mark.timeout(600)


def learn_by_heart(model: Path) -> None:
    """A random model cannot get much worse; one that knows its texts can."""
    tokenizer, tiny = AutoTokenizer.from_pretrained(model), LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    talks = [json.loads(line)["messages"] for line in chats(40).splitlines()]
    ids = torch.tensor([[token for talk in talks for token in tokenizer.apply_chat_template(talk, return_dict=False)]])
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.zero_grad()
        # As many as its positions allow.
        some = ids[:, :512] if step % 2 else ids[:, -512:]
        tiny(input_ids=some, labels=some).loss.backward()
        optimizer.step()
    tiny.save_pretrained(model)
    (model / "MANIFEST.json").unlink()


@pytest.mark.slow
def test_an_exploding_loss_is_tried_again_and_then_told_with_a_rate(station: Station) -> None:
    learn_by_heart(station.model)
    # An adapter's learning rate of 1 is not enough: after four steps the loss is below a blind guess again.
    station.write(
        method={"type": "Full"},
        hyperparameters={"learningRate": 1.0, "steps": 12, "batchTokens": 256},
        checkpoint={"everySteps": 1},
    )
    done = station.train("--workers", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    told = r"the loss exploded: [\d.e+, ]+ at steps (\d+) to (\d+), after at most [\d.]+ before; "
    change = r"lower spec\.hyperparameters\.learningRate from 1 to 2e-05; samples of step \d+: "
    where = r"configmap://chats/train\.jsonl:\d+, \d+"
    assert re.search(f"small: Recovering .*{told}{change}{where}.* \\(try 1 of 1\\)", done.stdout), done.stdout
    failed = re.search(f"✗ small: Failed \\(failed\\): NumericalDivergence: {told}{change}{where}", done.stderr)
    assert failed, done.stderr
    assert "next: tail -50 " in done.stderr
    newest = max((int(file.parent.name[5:13]) for file in station.run.glob("checkpoints/*/MANIFEST.json")), default=0)
    assert newest < int(failed[1]) - 1


@pytest.mark.slow
def test_a_damaged_base_model_is_named_with_its_weight(station: Station) -> None:
    station.write(hyperparameters={"steps": 4})
    weights = load_file(station.model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.self_attn.o_proj.weight"))
    weights[name][0, 0] = math.nan
    save_file(weights, station.model / "model.safetensors", metadata={"format": "pt"})
    (station.model / "MANIFEST.json").unlink()
    done = station.train()
    assert done.returncode == 1, done.stdout + done.stderr
    sentence = "NumericalDivergence: the loss is not finite at step 1 (20 of 20 samples, the first "
    assert sentence in done.stderr, done.stderr
    assert f"; the base model is damaged: {name} holds 1 numbers that are not finite; bring it in again" in done.stderr
    assert not list(station.run.glob("checkpoints/*/MANIFEST.json"))


def test_ctrl_c_saves_and_the_same_command_goes_on(station: Station) -> None:
    station.write(hyperparameters={"steps": 4000, "batchTokens": 256})
    process = station.start("train", "job.yaml", "--store", str(station.store))
    metrics = station.run / "attempts/1/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, what="some steps", timeout=120)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 143, said + error
    assert "small: Suspended (is suspended): stopped on request; what was saved is in " in error
    assert f"next: tuneward train job.yaml --store {station.store}" in error
    (saved,) = station.run.glob("checkpoints/*/MANIFEST.json")
    station.write(hyperparameters={"steps": 5, "batchTokens": 256}, datasets={**TRAINING, "validationFraction": 0.2})
    assert "--restart" in station.train().stderr
    # What was saved is the same command's to go on from.
    station.write(hyperparameters={"steps": 4000, "batchTokens": 256})
    process = station.start("train", "job.yaml", "--store", str(station.store))
    second = station.run / "attempts/2/start.json"
    wait_for(lambda: second.exists() and second.read_text().endswith("\n"), what="the second attempt", timeout=120)
    assert json.loads(second.read_text())["fromStep"] == int(saved.parent.name[5:13]) > 5
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)


def test_a_terminal_shows_the_curve_of_a_job_begun_anew(station: Station) -> None:
    station.run.mkdir(parents=True)
    (station.run / "request.json").write_text("of another version")
    station.write(hyperparameters={"steps": 12, "batchTokens": 256}, datasets={**TRAINING, "validationFraction": 0.2})
    asked = ("train", "job.yaml", "--store", str(station.store), "--restart", "--profile", "2-3")
    code, shown = station.on_a_terminal(*asked)
    assert code == 0, shown
    assert json.loads((station.run / "attempts/1/start.json").read_text())["fromStep"] == 0
    assert (station.run / "loss.svg").read_text().startswith("<svg ")
    assert "└────" in shown
    assert "step 0 " in shown
    assert "loss  · training   ● validation" in shown
    # Speed and memory are those of the last look, which so short a training may escape.
    assert re.search(r"step 12/12, loss [\d.]+(, [\d,]+ tokens/s)?(, [\d.]+ GiB)?\s", shown), shown
    assert f"  loss curve: {station.run / 'loss.svg'}" in shown
    trace = station.run / "attempts/1/trace-2-3.json.gz"
    assert trace.is_file()
    assert f"  trace, for ui.perfetto.dev: {trace}" in shown
