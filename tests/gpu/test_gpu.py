"""What only a GPU can show: kernels give what the plain model gives, a step does not wait for the device, jobs end in adapters.

`make test-gpu`, on a machine with one GPU or more. These have not been run yet: none was at hand.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.trainer.jobs import DEADLINE, TARGETS, Job, make_job, make_model, step_lines, tiny_config
from tests.trainer.test_full import FULL
from tests.trainer.test_full import PACKED as OF_WHOLE
from torch import Tensor

from tuneward_api.resolved import ResolvedMethod, ResolvedPacking
from tuneward_trainer import fp8, patches, probe
from tuneward_trainer.batch import Batch, collate
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.engine import Engine
from tuneward_trainer.feed import Feed
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, load_base
from tuneward_trainer.progress import Clock, Reporter
from tuneward_trainer.session import Stop, begin
from tuneward_trainer.train import one_step

GPU = torch.device("cuda", 0)
METHOD = ResolvedMethod(
    type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
)
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 64, which every kernel takes."""


def engine_on(folder: Path, device: torch.device) -> Engine:
    model = add_adapters(load_base(folder, device), METHOD, seed=0, base_uri="")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # Else an adapter adds nothing, whatever is wrong with it.
                parameter.fill_(0.02)
    return Engine(model, weight_decay=0.0, max_grad_norm=1.0)


def batch_of(job: Job) -> Batch:
    training = Documents.open(job.store / "data/tiny" / TRAINING)
    return collate(((index, training[index]) for index in range(6)), longest=48)


def learnt(engine: Engine, batch: Batch, names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with patches.applied(engine.model, names) as forward:
        output = engine.forward_backward(forward, batch.to(device), cross_entropy)
    return output.logprobs.cpu(), engine.gradient.cpu()


@pytest.mark.parametrize("window", [None, 24])
def test_a_packed_row_in_bf16_is_the_plain_model_in_fp32(tmp_path: Path, window: int | None) -> None:
    job = make_job(tmp_path, config=tiny_config(**SHAPE))
    folder = job.store / "models/tiny"
    if window is not None:
        from transformers import MistralConfig

        config = MistralConfig(**{**tiny_config(**SHAPE).to_dict(), "sliding_window": window, "model_type": "mistral"})
        config.architectures = ["MistralForCausalLM"]
        folder = make_model(tmp_path / "mistral", config)
    batch = batch_of(job)
    expected, slope = learnt(engine_on(folder, torch.device("cpu")), batch, (), torch.device("cpu"))
    found, gradient = learnt(engine_on(folder, GPU), batch, patches.ALL, GPU)
    # bf16 has eight bits; a wrong mask or scale is off by far more.
    assert torch.nn.functional.cosine_similarity(gradient, slope, 0) > 0.99
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_for_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    job = make_job(tmp_path, config=tiny_config(**SHAPE))
    engine, batch = engine_on(job.store / "models/tiny", GPU), batch_of(job)
    with patches.applied(engine.model) as forward:
        for warm in (True, False):
            if not warm:
                request.getfixturevalue("no_waiting")
            engine.forward_backward(forward, batch.to(GPU), cross_entropy)
            engine.optim_step(1e-3, engine.gradient.clone())


def test_a_training_waits_for_no_numbers_but_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Feed, sum and flags included; reading a step's numbers waits for an event, which is none of what torch counts."""
    job = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 1}}, config=tiny_config(**SHAPE))
    for name, value in job.variables().items():
        monkeypatch.setenv(name, value)
    session = begin(job.plan, Gang(0, 1, GPU), Stop(), Reporter(None, 0))
    assert session.ahead
    done = None
    with patches.applied(session.engine.model) as forward, Feed.of(session) as feed:
        for step in range(4):
            if step == 1:
                request.getfixturevalue("no_waiting")
            done = one_step(session, forward, feed, Clock(12), done)
    assert done is not None


def test_compiled_layers_are_right_on_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, by the check that every attempt makes."""
    names = [*patches.ALL, patches.COMPILED]
    packing = ResolvedPacking(mode="Packed", reason="", patches=names)
    job = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 1}}, config=tiny_config(**SHAPE), packing=packing)
    for name, value in job.variables().items():
        monkeypatch.setenv(name, value)
    session = begin(job.plan, Gang(0, 1, GPU), Stop(), Reporter(None, 0))
    assert probe.usable(session) == names
    assert session.row_length == 48


@pytest.mark.parametrize("quick", [False, True])
def test_packed_weights_give_on_this_gpu_what_they_give_on_a_cpu(quick: bool) -> None:
    if not fp8.supported(GPU):
        pytest.skip(f"{torch.cuda.get_device_name(GPU)} multiplies no fp8: that takes Ada, Hopper or later")
    torch.manual_seed(0)
    # Numbers that bf16 can hold, so that both pack the same ones.
    plain = torch.nn.Linear(256, 512, dtype=torch.bfloat16)
    x, gradient = torch.randn(40, 256).bfloat16(), torch.randn(40, 512).bfloat16()
    # Of a token whose loss is not counted.
    gradient[3] = 0
    found = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (GPU, torch.bfloat16)):
        layer = fp8.Linear(copy.deepcopy(plain).to(dtype), device, quick=quick).to(device)
        inputs = x.to(device, dtype).requires_grad_()
        out = layer(inputs)
        out.backward(gradient.to(device, dtype))
        assert inputs.grad is not None
        assert not inputs.grad[3].any()
        found.append([one.float().cpu() for one in (fp8.unpacked(layer), out.detach(), inputs.grad)])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


def worker(job: Job) -> None:
    """`tuneward train`'s own process, to its end."""
    environment = {**os.environ, **job.variables(), "TUNEWARD_HTTP_PORT": "0"}
    command = [sys.executable, "-m", "tuneward_trainer", "train", "--plan", str(job.plan_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5 * DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA", "DoRA", "Full"])
def test_a_job_learns_and_says_its_memory(tmp_path: Path, kind: str) -> None:
    how: dict[str, Any] = {"method": FULL, "packing": OF_WHOLE} if kind == "Full" else {"method": {"type": kind}}
    job = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 1}}, config=tiny_config(**SHAPE), **how)
    worker(job)
    (result,) = job.results()
    assert result.outcome == "Succeeded"
    lines = [json.loads(line) for line in step_lines(job)]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert all(line["memory_bytes"] > 0 for line in lines)


def test_deterministic_kernels_give_the_same_bytes_again(tmp_path: Path) -> None:
    spec = {"workers": {"gpusPerWorker": 1}, "hyperparameters": {"deterministic": True}}
    job = make_job(tmp_path, spec=spec, config=tiny_config(**SHAPE))
    again = job.again("again")
    worker(job)
    worker(again)
    assert again.adapter() == job.adapter()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two GPUs")
@pytest.mark.parametrize("weights", ["Replicated", "Sharded"])
def test_two_ranks_over_nccl_learn_what_one_learns(tmp_path: Path, weights: str) -> None:
    one = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 1}}, config=tiny_config(**SHAPE))
    two = make_job(tmp_path, spec={"workers": {"gpusPerWorker": 2}}, config=tiny_config(**SHAPE))
    prepared = two.plan.prepared.model_copy(update={"base_weights": weights})
    two = Job(two.store, two.plan.model_copy(update={"prepared": prepared})).again("two")
    worker(one)
    worker(two)
    alone, together = (job.results()[0].metrics.validation_loss_after for job in (one, two))
    assert alone is not None
    assert together is not None
    assert np.allclose(alone, together, rtol=1e-2)
