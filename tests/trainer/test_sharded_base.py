"""A frozen base split over ranks by FSDP2, adapters whole on each: the gradients are those of a base that each rank has whole,
bit for bit, for every patch asks its layer for the weight in both passes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.trainer import test_memory
from tests.trainer.jobs import DEADLINE, TARGETS, context, free_port, tiny_config
from tests.trainer.quantised import to_fp8
from tests.trainer.test_memory import batch_of, config_of, data_of, peak, setup_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tuneward_api.estimate import memory
from tuneward_api.resolved import ResolvedMethod
from tuneward_api.shape import Shape
from tuneward_trainer import distributed, nf4, patches, sharded, verify
from tuneward_trainer.batch import collate
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, load_base, load_to_share, packable, trainable
from tuneward_trainer.sharded import share

BASES = ("float32", "bfloat16", "nf4", "layers computed twice")
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


WIDE = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 1000}


def wide() -> PeftModel:
    """Its layers are larger than what a batch keeps of them."""
    return test_memory.adapted(config_of("Llama", **WIDE))


def digest(model: PeftModel, kind: str) -> str:
    """Of the gradients of two passes: the second finds the weights as the first has left them."""
    engine, batch = Engine(model, weight_decay=0.0, max_grad_norm=1.0), collate(enumerate(verify._documents()))
    with patches.applied(model, recompute=kind == "layers computed twice") as forward:
        for _ in range(2):
            engine.forward_backward(forward, batch, cross_entropy)
    return hashlib.sha256(engine.gradient.numpy().tobytes()).hexdigest()


def _rank(rank: int, port: int, file: Path) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    gang = distributed.join()
    found: dict[str, str | int] = {}
    (file.parent / str(rank)).mkdir()
    for kind in BASES:
        model = adapted(kind)
        share(model.get_base_model(), gang)
        found[kind] = digest(model, kind)
    model, batch = wide(), batch_of(200, 150)
    share(model.get_base_model(), gang)
    found["peak"] = peak(model, batch, file.parent / str(rank))
    file.with_suffix(f".{rank}").write_text(json.dumps(found))
    gang.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    port, file = free_port(), tmp_path_factory.mktemp("sharded") / "found"
    gang = [context.Process(target=_rank, args=(rank, port, file), daemon=True) for rank in range(WORLD)]
    for process in gang:
        process.start()
    for process in gang:
        process.join(DEADLINE)
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", BASES)
def test_a_sharded_base_gives_the_gradients_of_a_whole_one(kind: str, ranks: list[dict[str, Any]]) -> None:
    # As ranks do: the order of sums is that of one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert {found[kind] for found in ranks} == {digest(adapted(kind), kind)}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("family", "fp8"), [("Llama", False), ("Llama", True), ("Gemma2", False)])
def test_weights_that_are_converted_later_are_those_that_are_read_so(tmp_path: Path, family: str, fp8: bool) -> None:
    """From a bf16 file; Gemma's buffers are another number in bf16, and so is what fp8 is turned back into."""
    config = config_of(family)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    if fp8:
        to_fp8(tmp_path, block=None)
    read, later = load_base(tmp_path, torch.device("cpu")), load_to_share(tmp_path, torch.float32)
    assert {parameter.dtype for parameter in later.parameters()} == {torch.float32 if fp8 else torch.bfloat16}
    sharded._convert(later, torch.float32)
    tensors = [dict([*model.named_parameters(), *model.named_buffers()]) for model in (read, later)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=0)


def test_what_is_gathered_is_known(ranks: list[dict[str, Any]]) -> None:
    """The most that torch has at once, over a rank's share."""
    batch, shape = batch_of(200, 150), Shape.of(config_of("Llama", **WIDE).to_dict())
    setup = setup_of(wide(), batch, shards=WORLD)
    whole, shared = (memory(shape, data_of(batch), replace(setup, shards=shards)) for shards in (1, WORLD))
    assert shared.weights == whole.weights / WORLD
    gathered = shared.state - whole.state
    for found in ranks:
        assert found["peak"] == pytest.approx(gathered + shared.activations + max(shared.work, shared.head), rel=0.1)
