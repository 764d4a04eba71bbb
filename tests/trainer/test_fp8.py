"""Frozen weights in fp8: half of bf16, the product of the numbers that they stand for, and the gradient of that product.

torch multiplies fp8 on CPUs with the operation that GPUs have, so what is tested is what runs; what a GPU asks of layouts and
sides is checked on fake tensors. `make test-gpu` has its kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from tests.trainer.jobs import tiny_config
from tests.trainer.test_fake_gpu import METHOD
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from tuneward_trainer import attention, compiled, fp8, patches, verify
from tuneward_trainer.batch import Batch, collate, padded
from tuneward_trainer.losses import cross_entropy
from tuneward_trainer.model import add_adapters, trainable

CPU = torch.device("cpu")
QUICK = pytest.mark.parametrize("quick", [False, True], ids=["unpacked", "quick"])


def rounded(rows: Tensor, *, power_of_two: bool = False) -> Tensor:
    """[R, K]: what is left of each row's numbers in fp8, where the largest is 448 times the scale, or nearly so."""
    scale = rows.abs().amax(1, keepdim=True).float() / 448
    scale = scale.double().log2().ceil().exp2().float() if power_of_two else scale
    return torch.where(scale > 0, (rows / scale).to(torch.float8_e4m3fn).float() * scale, 0.0).to(rows.dtype)


class Reference(torch.autograd.Function):
    """The same in plain numbers: x and W rounded and multiplied, and of the gradient dY W, with dY rounded or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, quick: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.quick = quick
        return rounded(x.flatten(0, -2)).view(x.shape) @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.quick:
            gradient = rounded(gradient.flatten(0, -2) * scale.T).view(gradient.shape) / scale.T
        return gradient @ weight, None, None, None


class ReferenceLinear(nn.Module):
    def __init__(self, packed: fp8.Linear) -> None:
        super().__init__()
        self.plain, self.scale, self.quick = fp8.unpacked(packed), packed.scale, packed.quick

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Reference.apply(x, self.plain, self.scale, self.quick)
        return out


@pytest.fixture(scope="module")
def plain_model() -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(num_hidden_layers=3, vocab_size=verify.VOCABULARY)
        base = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").requires_grad_(False).eval()
        model = add_adapters(base, METHOD, seed=1, base_uri="")
        for parameter in trainable(model).values():
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def packed_model(plain_model: PeftModel) -> Callable[[bool], PeftModel]:
    def packed(quick: bool) -> PeftModel:
        model = copy.deepcopy(plain_model)
        fp8.pack(model, CPU, quick=quick)
        return model

    return packed


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def batch() -> Batch:
    return collate(enumerate(verify._documents()), longest=41)


def learnt(model: PeftModel, row: Batch, names: tuple[str, ...], **how: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with patches.applied(model, names, **how) as forward:
        torch.autograd.backward(cross_entropy(forward(row), row))
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None}


# -- a weight ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_a_byte_and_rounded_once(dtype: torch.dtype) -> None:
    plain = nn.Linear(64, 48, bias=False, dtype=dtype)
    plain.weight.data *= torch.logspace(-6, 6, 48, dtype=dtype)[:, None]
    plain.weight.data[7] = 0
    layer = fp8.Linear(plain, CPU, quick=False)
    assert (layer.weight.dtype, layer.weight.nbytes, layer.scale.nbytes) == (torch.float8_e4m3fn, 64 * 48, 4 * 48)
    found = fp8.unpacked(layer)
    assert found.dtype == dtype
    # Nothing of what was multiplied is lost: scales are powers of two.
    assert torch.equal(found.double(), layer.weight.double() * layer.scale.double())
    assert torch.equal(found, rounded(plain.weight.detach(), power_of_two=True))
    # Four significant bits, and below the smallest exponent a fixed step.
    slack = torch.maximum(plain.weight.double().abs() / 16, layer.scale.double() / 1024)
    assert bool(((found.double() - plain.weight.double()).abs() <= slack).all())


def test_linears_of_odd_sides_stay_plain() -> None:
    assert fp8.fits(nn.Linear(32, 48))
    assert not any(fp8.fits(layer) for layer in (nn.Linear(24, 32), nn.Linear(32, 24), nn.Embedding(16, 16)))


@QUICK
def test_the_product_is_that_of_what_the_numbers_stand_for(quick: bool) -> None:
    plain = nn.Linear(64, 48)
    layer = fp8.Linear(plain, CPU, quick=quick)
    x = torch.randn(3, 5, 64, requires_grad=True)
    out = layer(x)
    gradient = torch.randn(3, 5, 48)
    # Of a token whose loss is not counted.
    gradient[1] = 0
    out.backward(gradient)
    other = x.detach().clone().requires_grad_()
    wanted = Reference.apply(other, fp8.unpacked(layer), layer.scale, quick) + plain.bias
    wanted.backward(gradient)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)
    assert x.grad is not None
    assert other.grad is not None
    assert torch.allclose(x.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert not x.grad[1].any()


def test_what_is_not_finite_is_not_hidden() -> None:
    layer = fp8.Linear(nn.Linear(32, 16), CPU, quick=True)
    for wrong in (float("nan"), float("inf")):
        x = torch.ones(2, 32)
        x[1, 3] = wrong
        finite = layer(x).isfinite().all(1)
        assert finite.tolist() == [True, False]


# -- a model -------------------------------------------------------------------------------------------------------------


@QUICK
def test_gradients_are_those_of_the_rounded_model(packed_model: Callable[[bool], PeftModel], quick: bool) -> None:
    model = packed_model(quick)
    assert [type(layer.base_layer) for layer in layers(model)] == [fp8.Linear] * 21
    assert all(patches.fits_lora_linear(layer) for layer in layers(model))
    found = [learnt(model, batch(), names) for names in (patches.ALL, ())]
    for layer in layers(model):
        layer.base_layer = ReferenceLinear(layer.base_layer)
    wanted = learnt(model, batch(), ())
    for one in found:
        # A number that lies between two of fp8 may fall on the other side where sums are made in another order.
        assert all(
            nn.functional.cosine_similarity(one[name].flatten(), wanted[name].flatten(), 0) > 0.999 for name in wanted
        )
        assert one.keys() == wanted.keys() == trainable(model).keys()


def test_an_adapter_begins_as_on_a_plain_base(plain_model: PeftModel, packed_model: Callable[[bool], PeftModel]) -> None:
    packed = trainable(packed_model(False))
    assert all(torch.equal(packed[name], parameter) for name, parameter in trainable(plain_model).items())
    assert {parameter.dtype for parameter in packed.values()} == {torch.float32}


# -- what a GPU asks -----------------------------------------------------------------------------------------------------


@QUICK
def test_layouts_and_sides_are_what_a_gpu_multiplies(quick: bool) -> None:
    with FakeTensorMode():
        plain = nn.Linear(64, 48, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        layer = fp8.Linear(plain, torch.device("cuda"), quick=quick)
        out = fp8.product(torch.empty(40, 64, device="cuda", dtype=torch.bfloat16), layer)
        back = fp8.product_back(torch.empty(40, 48, device="cuda", dtype=torch.bfloat16), layer)
    for found, width in ((out, 48), (back, 64)):
        assert (found.shape, found.dtype, found.device.type) == ((40, width), torch.bfloat16, "cuda")


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    compiled.forget()
    counters.clear()
    yield
    compiled.forget()


# Dynamo looks at the gradients of what is none's.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("backend", "quick"),
    [
        ("eager", True),
        pytest.param("eager", False, marks=pytest.mark.slow),
        pytest.param(compiled.CHECKED_BACKEND, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_are_two_graphs(
    packed_model: Callable[[bool], PeftModel],
    nothing_compiled: None,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    quick: bool,
) -> None:
    every = (*patches.ALL, patches.COMPILED)
    graphs, model, row = CompileCounterWithBackend(backend), packed_model(quick), padded(batch(), 128)
    found, wanted = learnt(model, row, every, backend=graphs), learnt(model, row, patches.ALL)
    assert all(nn.functional.cosine_similarity(found[name].flatten(), wanted[name].flatten(), 0) > 0.999 for name in wanted)
    # And as on a GPU: its attention, bf16, shapes and types without numbers.
    monkeypatch.setattr(attention, "on_gpu", lambda tensor: True)
    empty = model.to("meta")
    for one in (*empty.parameters(), *empty.buffers()):
        if one.dtype == torch.float32 and not one.requires_grad and one.shape[-1] != 1:
            one.data = one.data.to(torch.bfloat16)
    for layer in layers(empty):
        layer.base_layer.dtype = torch.bfloat16
    there: dict[str, Any] = {name: tensor.to("meta") for name, tensor in row.tensors.items()}
    compiled.forget()
    learnt(empty, replace(row, **there), every, backend=graphs)
    assert (graphs.frame_count, dict(counters["graph_break"])) == (4, {})
