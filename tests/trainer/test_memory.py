"""The estimate of memory against the trainer, family by family: what is kept, and what torch itself has counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from tests.trainer.jobs import DEADLINE, context, free_port
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tuneward_api.estimate import GIB, Data, Setup, memory, tokens_that_fit
from tuneward_api.resolved import ResolvedHyperparameters, ResolvedMethod
from tuneward_api.shape import Shape
from tuneward_trainer import distributed, nf4, patches
from tuneward_trainer.batch import Batch, collate
from tuneward_trainer.engine import Engine
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.memory import Choice, Costs, _packed
from tuneward_trainer.model import add_adapters, packable, target_linears

SIZES = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"head_dim": 32, "sliding_window": None},
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Gemma": {"head_dim": 32, "num_key_value_heads": 1},
    "Gemma2": {"head_dim": 32},
    "Gemma3Text": {"head_dim": 32, "sliding_window": 4096},
    "Phi3": {},
    "Olmo2": {},
    "Olmo3": {},
    "Glm": {"head_dim": 32},
    "Glm4": {"head_dim": 32},
    "SmolLM3": {},
    "Starcoder2": {},
    "Granite": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "Qwen3Moe": {"head_dim": 32, "num_experts": 8, **EXPERTS},
}
LENGTHS = (700, 300, 500)


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("Mistral", {"intermediate_size": 32}),
    ("Mistral", {"vocab_size": 20_000}),
    ("Mistral", {"num_key_value_heads": 6}),
]
by_variant = pytest.mark.parametrize(
    ("family", "changes"), VARIANTS, ids=[family + "".join(f"-{name}" for name in changes) for family, changes in VARIANTS]
)


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    kind = getattr(transformers, f"{family}Config")
    found: PreTrainedConfig = kind(**{**SIZES, **FAMILIES[family], **changes})
    return found


def adapted(config: PreTrainedConfig, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if config.model_type != "gemma2" else "eager"
    )
    model.requires_grad_(False).eval()
    numbers: dict[str, Any] = {
        "type": "LoRA", "rank": 8, "alpha": 8.0, "dropout": 0.0, "rs_lora": False,
        "target_modules": target_linears(model), "trainable_parameters": 0,
    }  # fmt: skip
    return add_adapters(model, ResolvedMethod(**numbers | changes), seed=0, base_uri="x")


class Sample:
    """Every second token is learnt, the last one too."""

    def __init__(self, length: int) -> None:
        self.ids = np.arange(length, dtype=np.int32) % 400 + 3
        self.weights = np.asarray([0.0, 1.0] * (length // 2), np.float16)


def batch_of(*lengths: int) -> Batch:
    return collate(list(enumerate(Sample(length) for length in lengths)))


@contextmanager
def counted(model: PeftModel, batch: Batch) -> Iterator[dict[int, int]]:
    """Address -> bytes of every storage that is saved for a backward pass, without those that live in any case."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    known |= {value.untyped_storage().data_ptr() for value in vars(batch).values() if isinstance(value, Tensor)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def saved(model: PeftModel, batch: Batch, **options: Any) -> int:
    with patches.applied(model, **options) as forward:
        with counted(model, batch) as found:
            loss = cross_entropy(forward(batch), batch)
            total = sum(found.values())
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def peak(model: PeftModel, batch: Batch, folder: Path) -> int:
    """Bytes that torch's CPU allocator had in use at most, over what it had before."""
    engine = Engine(model, weight_decay=0.0, max_grad_norm=1.0)
    with patches.applied(model) as forward:
        engine.forward_backward(forward, batch, cross_entropy)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine.forward_backward(forward, batch, cross_entropy)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = [
        event for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if event["name"] == "[memory]"
    ]
    level = highest = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        level += int(event["args"]["Bytes"])
        highest = max(highest, level)
    return highest


def setup_of(model: PeftModel, batch: Batch, **changes: Any) -> Setup:
    targets = frozenset(model.peft_config["default"].target_modules)
    return replace(Setup(tokens=batch.tokens, rank=8, targets=targets), **changes)


def data_of(batch: Batch) -> Data:
    sizes = np.diff(batch.bounds).astype(float)
    return Data(learnt=len(batch.rows) / batch.tokens, length=float((sizes**2).sum() / sizes.sum()))


@by_variant
def test_what_is_saved_for_the_backward_pass_is_known(family: str, changes: dict[str, Any]) -> None:
    model, batch = adapted(config_of(family, **changes)), batch_of(*LENGTHS)
    shape = Shape.of(config_of(family, **changes).to_dict())
    estimated = memory(shape, data_of(batch), setup_of(model, batch))
    assert shape.known
    assert estimated.activations == pytest.approx(saved(model, batch), rel=0.05)


@by_variant
def test_the_peak_is_known(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, batch = adapted(config_of(family, **changes)), batch_of(*LENGTHS)
    estimated = memory(Shape.of(config_of(family, **changes).to_dict()), data_of(batch), setup_of(model, batch))
    assert estimated.activations + max(estimated.work, estimated.head) == pytest.approx(
        peak(model, batch, tmp_path), rel=0.1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family: str) -> None:
    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config.to_dict())
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
    found = adapted(config)
    assert shape.lora(8) == sum(p.numel() for p in found.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("changes", "setup"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {}),
        ({"target_modules": ["down_proj"]}, {}),
        ({"dropout": 0.1}, {"dropout": True}),
        ({"type": "DoRA"}, {"dora": True}),
    ],
    ids=["attention", "down", "dropout", "dora"],
)
def test_other_adapters_keep_other_things(changes: dict[str, Any], setup: dict[str, Any]) -> None:
    model, batch = adapted(config_of("Llama"), **changes), batch_of(*LENGTHS)
    if setup.get("dropout"):
        model.train()
    shape = Shape.of(config_of("Llama").to_dict())
    estimated = memory(shape, data_of(batch), setup_of(model, batch, **setup))
    assert estimated.activations == pytest.approx(saved(model, batch), rel=0.05)


def test_packed_weights_are_known_with_the_one_that_is_unpacked(tmp_path: Path) -> None:
    config = config_of("Llama", hidden_size=128, num_attention_heads=4)
    base = AutoModelForCausalLM.from_config(config)
    base.requires_grad_(False)
    nf4.pack(base, packable(base), torch.device("cpu"))
    scales = [layer.weight.quant_state for layer in base.modules() if nf4.is_packed(layer)]
    held = sum(parameter.nbytes for parameter in base.parameters())
    held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in scales)
    shape = Shape.of(config.to_dict())
    method = ResolvedMethod(
        type="QLoRA", rank=8, alpha=16.0, dropout=0.0, rs_lora=False, target_modules=target_linears(base),
        trainable_parameters=0,
    )  # fmt: skip
    model, batch = add_adapters(base.eval(), method, seed=0, base_uri=""), batch_of(*LENGTHS)
    estimated = memory(shape, data_of(batch), setup_of(model, batch, nf4=True))
    assert estimated.weights == pytest.approx(held, rel=0.01)
    assert estimated.activations == pytest.approx(saved(model, batch), rel=0.05)
    assert estimated.activations + estimated.work == pytest.approx(peak(model, batch, tmp_path), rel=0.1)


def test_qlora_is_named_where_it_would_fit() -> None:
    whole = costs(MISTRAL_7B, sequence_length=1024)
    assert _packed("LoRA", whole, Choice(1), 24 * GIB) == "use spec.method.type QLoRA (about 12.2 GiB), "
    assert _packed("LoRA", whole, Choice(1), 16 * GIB) == _packed("QLoRA", whole, Choice(1), 24 * GIB) == ""


def test_recomputing_keeps_the_inputs_of_layers_and_changes_no_gradient() -> None:
    model, batch = adapted(config_of("Llama", num_hidden_layers=6)), batch_of(*LENGTHS)
    shape = Shape.of(config_of("Llama", num_hidden_layers=6).to_dict())
    gradients, kept = [], []
    for recompute in (False, True):
        model.zero_grad()
        kept.append(saved(model, batch, recompute=recompute))
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    # While one layer is computed again, it is there beside the inputs of all.
    layer = kept[0] / 6
    estimated = memory(shape, data_of(batch), setup_of(model, batch, recompute=True))
    assert estimated.activations == pytest.approx(kept[1] + layer, rel=0.1)
    assert estimated.activations < kept[0] / 2


# -- what it is used for ---------------------------------------------------------------------------------------------------

MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
}  # fmt: skip
DATA = Data(learnt=0.45, length=1000)


def test_a_model_of_seven_billion_parameters_fits_a_gpu_of_eighty_gigabytes() -> None:
    shape = Shape.of(MISTRAL_7B)
    assert shape.parameters == 7_248_023_552
    setup = Setup(tokens=8192, device="cuda")
    assert memory(shape, DATA, setup).weights == 2 * shape.parameters
    fit = tokens_that_fit(shape, DATA, setup, 80 * GIB)
    assert 8192 < fit < 32768
    assert memory(shape, DATA, replace(setup, tokens=fit)).resident <= 80 * GIB
    assert memory(shape, DATA, replace(setup, tokens=fit + 1)).resident > 80 * GIB
    assert tokens_that_fit(shape, DATA, replace(setup, recompute=True), 80 * GIB) > 2 * fit


def test_nothing_fits_where_the_weights_alone_do_not() -> None:
    assert tokens_that_fit(Shape.of(MISTRAL_7B), DATA, Setup(tokens=0, device="cuda"), 8 * GIB) == 0


def costs(config: dict[str, Any], **hyper: Any) -> Costs:
    numbers: dict[str, Any] = {
        "epochs": 1.0, "steps": 1, "learning_rate": 1e-4, "scheduler": "Cosine", "warmup_fraction": 0.1, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "sequence_length": 4096, "batch_tokens": 65_536, "seed": 0,
    }  # fmt: skip
    method = ResolvedMethod(
        type="LoRA", rank=16, alpha=32.0, dropout=0.0, rs_lora=False, trainable_parameters=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    shape = Shape.of(config)
    resolved = ResolvedHyperparameters(**numbers | hyper)
    return Costs.of(shape, method, resolved, parameters=shape.parameters, data=DATA, device="cuda")


@pytest.mark.parametrize(
    ("gib", "length", "choice"),
    [
        (None, 4096, Choice(2)),
        (80, 4096, Choice(2)),
        (80, 1000, Choice(8)),
        # More rows would make no kernel faster.
        (800, 4096, Choice(2)),
        (40, 4096, Choice(1)),
        (24, 1024, Choice(1)),
        (24, 4096, Choice(2, recompute=True)),
        (24, 8192, Choice(1, recompute=True)),
        # Not even then: it is tried, and the sentence says what to lower.
        (12, 4096, Choice(1, recompute=True)),
    ],
)
def test_rows_are_as_many_as_fit_and_help(gib: int | None, length: int, choice: Choice) -> None:
    assert costs(MISTRAL_7B, sequence_length=length).choose(None if gib is None else gib * GIB) == choice


def test_small_batches_are_not_filled_up() -> None:
    assert costs(MISTRAL_7B, sequence_length=512, batch_tokens=2048).choose(800 * GIB) == Choice(4)


def _say_the_smallest(rank: int, port: int, file: Path) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    gang = distributed.join()
    file.with_suffix(f".{rank}").write_text(str(gang.smallest((80 - 56 * rank) * GIB)))
    gang.close()


def test_all_ranks_take_what_the_smallest_gpu_holds(tmp_path: Path) -> None:
    port = free_port()
    ranks = [context.Process(target=_say_the_smallest, args=(rank, port, tmp_path / "said")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(DEADLINE)
    assert [(tmp_path / f"said.{rank}").read_text() for rank in range(2)] == [str(24 * GIB)] * 2
