"""A frozen base split over ranks by FSDP2, adapters whole on each: the gradients are those of a base that each rank has whole,
bit for bit, for every patch asks its layer for the weight in both passes. No job does this yet."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.trainer.jobs import DEADLINE, TARGETS, context, free_port, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import distributed, nf4, patches, verify
from tuneward_trainer.batch import collate
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, packable, trainable

BASES = ("float32", "bfloat16", "nf4")
WORLD = 2


def adapted(kind: str) -> PeftModel:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=verify.VOCABULARY, hidden_size=64, intermediate_size=128)
    base = LlamaForCausalLM(config).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    base.requires_grad_(False)
    if kind == "nf4":
        nf4.pack(base, packable(base), torch.device("cpu"))
    method = ResolvedMethod(
        type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
    )
    model = add_adapters(base.eval(), method, seed=3, base_uri="")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.05)
    return model


def shard(model: PeftModel) -> None:
    """A group for each layer; packed weights are bytes, and their scales stay whole."""
    mesh, adapters, base = init_device_mesh("cpu", (WORLD,)), set(trainable(model).values()), model.get_base_model()
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, base):
        fully_shard(module, mesh=mesh, ignored_params=adapters)


def digest(model: PeftModel) -> str:
    """Of the gradients of two passes: the second finds the weights as the first has left them."""
    engine, batch = Engine(model, weight_decay=0.0, max_grad_norm=1.0), collate(enumerate(verify._documents()))
    with patches.applied(model) as forward:
        for _ in range(2):
            engine.forward_backward(forward, batch, cross_entropy)
    return hashlib.sha256(engine.gradient.numpy().tobytes()).hexdigest()


def _rank(rank: int, port: int, file: Path) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    gang, found = distributed.join(), {}
    for kind in BASES:
        model = adapted(kind)
        shard(model)
        found[kind] = digest(model)
    file.with_suffix(f".{rank}").write_text(json.dumps(found))
    gang.close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank found."""
    port, file = free_port(), tmp_path_factory.mktemp("sharded") / "found"
    ranks = [context.Process(target=_rank, args=(rank, port, file), daemon=True) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(DEADLINE)
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", BASES)
def test_a_sharded_base_gives_the_gradients_of_a_whole_one(kind: str, sharded: list[dict[str, str]]) -> None:
    # As ranks do: the order of sums is that of one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert {found[kind] for found in sharded} == {digest(adapted(kind))}
    finally:
        torch.set_num_threads(threads)
