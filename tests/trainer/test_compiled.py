"""Compiled layers: two graphs without a break for all layers and all rows, the same gradients, and left out where they are not.

Graphs are checked on a CPU by the backend that runs them as they are; kernels are made in `make test-slow` and on a GPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.trainer import families
from tests.trainer.jobs import Job, make_job, tiny_config
from tests.trainer.sessions import losses
from tests.trainer.test_fake_gpu import METHOD
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedConfig

from tuneward_api.resolved import ResolvedPacking
from tuneward_trainer import attention, compiled, patches, prepare, probe, verify
from tuneward_trainer.batch import Batch, collate, padded
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, decoder_layers, model_class, plain, trainable
from tuneward_trainer.session import Session, conclude
from tuneward_trainer.train import train

# Dynamo looks at the gradients of what is none's.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
EVERY = (*patches.ALL, patches.COMPILED)
BACKENDS = pytest.mark.parametrize("backend", ["eager", pytest.param(compiled.CHECKED_BACKEND, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Neither before nor after: what is compiled belongs to the process."""
    compiled.forget()
    counters.clear()
    yield
    compiled.forget()


def examine(config: PreTrainedConfig) -> ResolvedPacking:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    return verify._examine(model_class(config.to_dict()), config, compiling=True)


def learnt(model: Any, batch: Batch, names: tuple[str, ...], **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with patches.applied(model, names, **how) as forward:
        torch.autograd.backward(cross_entropy(forward(batch), batch))
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


@pytest.fixture(scope="module")
def three_layers() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(num_hidden_layers=3, vocab_size=verify.VOCABULARY)
        base = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        model = add_adapters(base.requires_grad_(False).eval(), METHOD, seed=1, base_uri="")
        for parameter in trainable(model).values():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batches() -> list[Batch]:
    """Of three documents, of two and of one."""
    samples = list(enumerate(verify._documents()))
    return [padded(collate(chosen, longest=41), 128) for chosen in (samples, samples[1:], samples[:1])]


@BACKENDS
def test_all_rows_and_layers_take_two_graphs_without_a_break(three_layers: Any, backend: str) -> None:
    """The first layer's, whose input needs no gradient, and that of every other one."""
    graphs = CompileCounterWithBackend(backend)
    for batch in batches():
        found = learnt(three_layers, batch, EVERY, backend=graphs)
        worst, where = verify.worst_error(found, learnt(three_layers, batch, patches.ALL))
        assert worst < 1e-5, where
    assert (graphs.frame_count, counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (2, 2, {})
    # Layers that are computed twice, and rows of any length that need no gradient, make no other.
    again = learnt(three_layers, batches()[0], EVERY, backend=graphs, recompute=True)
    assert verify.worst_error(again, learnt(three_layers, batches()[0], patches.ALL))[0] < 1e-5
    short = collate(enumerate(verify._documents()[:2]))
    with patches.applied(three_layers, EVERY, backend=graphs) as forward, torch.no_grad():
        quick = forward(short)
    with patches.applied(three_layers) as forward, torch.no_grad():
        assert torch.equal(forward(short), quick)
    assert graphs.frame_count == 2
    assert "forward" not in vars(decoder_layers(plain(three_layers))[0])


@BACKENDS
def test_the_kernel_of_gpus_is_part_of_the_graph(three_layers: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """torch's variable-length attention on the meta device: shapes, types and graphs as on a GPU, forward and backward."""
    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    model = copy.deepcopy(three_layers).to("meta")
    for parameter in model.parameters():
        # A bf16 base with fp32 adapters, as on a GPU.
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    for batch in batches():
        there: dict[str, Any] = {name: tensor.to("meta") for name, tensor in batch.tensors.items()}
        learnt(model, replace(batch, **there), EVERY, backend=graphs)
    assert (graphs.frame_count, dict(counters["graph_break"])) == (2, {})


@pytest.mark.parametrize(
    ("uid", "workers", "method", "said", "expected"),
    [
        ("a", {"gpusPerWorker": 8}, {}, None, True),
        ("a", None, {"type": "QLoRA"}, None, True),
        ("a", {"gpusPerWorker": 8}, {}, "0", False),
        ("a", {"gpusPerWorker": 8}, {"dropout": 0.1}, None, False),
        ("a", {"gpusPerWorker": 8}, {"type": "DoRA"}, None, False),
        ("a", {"gpusPerWorker": 0}, {}, None, False),
        ("a", {"gpusPerWorker": 0}, {}, "1", True),
        # A workstation without a GPU.
        ("", {"gpusPerWorker": 8}, {}, None, False),
    ],
)
def test_prepare_looks_at_graphs_where_ranks_will_compile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uid: str,
    workers: dict[str, int] | None,
    method: dict[str, Any],
    said: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TUNEWARD_COMPILE", raising=False)
    if said is not None:
        monkeypatch.setenv("TUNEWARD_COMPILE", said)
    job = make_job(tmp_path, spec={"workers": workers} if workers else {}, method=method)
    request = job.plan.request
    request = request.model_copy(update={"job": request.job.model_copy(update={"uid": uid})})
    assert prepare.compiles(request, job.plan.prepared.method) is expected


@pytest.mark.slow
def test_prepare_takes_a_graph_that_agrees() -> None:
    assert examine(transformers.LlamaConfig()).patches == list(EVERY)


def test_a_compiled_layer_that_disagrees_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            return tuple(1.01 * out if out.is_floating_point() else out for out in graph(*arguments))

        return run

    monkeypatch.setattr(compiled, "CHECKED_BACKEND", wrong)
    verdict = examine(transformers.LlamaConfig())
    assert verdict.patches == list(patches.ALL)
    assert "; compiled-layers left out: gradients differ by" in verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families.PACKED.keys() - {"gemma2", "gpt_oss"}))
def test_layers_of_nearly_all_families_are_graphs(family: str) -> None:
    config = families.PACKED[family]
    verdict = verify._examine(families.served_class(config), config, compiling=True)
    assert verdict.patches == list(EVERY), verdict.reason


def test_a_layer_that_is_no_single_graph_is_left_out_and_named() -> None:
    verdict = examine(transformers.Gemma2Config())
    assert verdict.patches == list(patches.ALL)
    assert "; compiled-layers left out: Unsupported: raised exception NotImplementedError('a graph can hold no kernel" in (
        verdict.reason
    )


# -- rows of one length --------------------------------------------------------------------------------------------------


def test_a_padded_row_says_the_same_of_its_documents() -> None:
    batch = collate(enumerate(verify._documents()), longest=41)
    row = padded(batch, 256)
    assert (len(row.ids), len(row.positions), int(row.cu[-1])) == (256, 256, 256)
    assert int(row.cu.diff().max()) <= 41
    assert [int(row.positions[start]) for start in row.cu[:-1].tolist()] == [0] * (len(row.cu) - 1)
    assert (row.tokens, row.documents, row.row_bounds, row.sources) == (
        batch.tokens, batch.documents, batch.row_bounds, batch.sources,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a row of"):
        padded(batch, 64)


# -- a training ----------------------------------------------------------------------------------------------------------


def trained(job: Job, make: Callable[..., Session]) -> Session:
    session = make(job, ahead=False)
    train(session)
    conclude(session, seconds=0)
    return session


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, Job]:
    """A job without compiled layers, and one whose plan has them."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    job = make_job(tmp_path, hyper={"steps": 3})
    packing = job.plan.prepared.packing.model_copy(update={"patches": list(EVERY)})
    prepared = job.plan.prepared.model_copy(update={"packing": packing})
    return job, Job(job.store, job.plan.model_copy(update={"prepared": prepared})).again("compiled")


def test_compiled_training_learns_the_same_and_a_cpu_compiles_nothing_unasked(
    jobs: tuple[Job, Job],
    begun: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, other = jobs
    trained(job, begun)
    assert trained(other, begun).row_length == 0
    assert other.adapter() == job.adapter()
    monkeypatch.setenv("TUNEWARD_COMPILE", "1")
    asked = other.again("asked")
    assert trained(asked, begun).row_length == 48
    assert counters["stats"]["unique_graphs"] == 2
    assert np.allclose(losses(asked), losses(job), rtol=1e-5)


def test_layers_that_are_wrong_on_the_device_are_not_used(
    jobs: tuple[Job, Job],
    begun: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TUNEWARD_COMPILE", "1")
    _, job = jobs
    session = begun(job, ahead=False)
    for backend, said in (("no-such-backend", "InvalidBackend"), (half, "log-probabilities differ by")):
        monkeypatch.setattr(compiled, "BACKEND", backend)
        with caplog.at_level(logging.WARNING):
            assert probe.usable(session) == list(patches.ALL)
        assert f"the patch compiled-layers is not used: {said}" in caplog.text
        assert session.row_length == 0
        assert not session.engine.gradient.any()
    caplog.clear()
    session.gang = replace(session.gang, model_sharded=True)
    assert probe.usable(session) == list(patches.ALL)
    assert "differ" not in caplog.text, "a layer of a sharded base is not tried: breaking off there would hang other ranks"


def half(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return lambda *arguments: tuple(0.5 * out if out.is_floating_point() else out for out in graph(*arguments))


@pytest.mark.slow
def test_inductors_kernels_learn_the_same(three_layers: Any) -> None:
    """Its C++ for CPUs; takes a compiler and half a minute."""
    for batch in batches()[:2]:
        found = learnt(three_layers, batch, EVERY, backend="inductor")
        assert verify.worst_error(found, learnt(three_layers, batch, patches.ALL))[0] < 1e-5
