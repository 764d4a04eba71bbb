"""Rotary position embeddings in fewer passes over memory.

transformers writes x cos + rotate_half(x) sin, for queries and for keys: a copy with its halves swapped, and as many tensors
as there are signs, in a layer that on a CPU waits for memory. The gradient goes through all of them again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from tuneward_trainer.model import instance_forward

_NAME: Final = "apply_rotary_pos_emb"
"""What nearly all files of models call it; each has one of its own."""

Rotate = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def patched(base: nn.Module) -> Iterator[None]:
    """In the modules of `base` that turn queries and keys; other models of their classes keep what they have."""
    forwards: dict[type[nn.Module], Callable[..., Any] | None] = {}
    with ExitStack() as stack:
        for module in base.modules():
            kind = type(module)
            if kind not in forwards:
                forwards[kind] = _forward(kind)
            if (forward := forwards[kind]) is not None:
                stack.enter_context(instance_forward(module, functools.partial(forward, module)))
        yield


def _forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The class's own code, to which the rotation's name means this one; None where it does not name it. What is wrapped
    around that code warns of old keywords, which no decoder gives: were it more, verify() would tell."""
    own = inspect.unwrap(kind.forward)
    if not isinstance(own, FunctionType) or _NAME not in own.__code__.co_names:
        return None
    original = own.__globals__.get(_NAME)
    if not callable(original) or not turns_halves(original):
        return None
    names = {**own.__globals__, _NAME: functools.partial(_rotated, original)}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


@functools.lru_cache(maxsize=256)
def turns_halves(original: Rotate) -> bool:
    """Whether it is what this does: found out by trying it, with cosines and sines that differ in every place. GLM turns
    neighbours, Llama 4 complex numbers, and others want to know more."""
    shapes = ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    # Where tensors have no numbers, as on a fake GPU, these have.
    with _disable_current_modes():
        random = torch.Generator().manual_seed(0)
        query, key, cos, sin = (torch.randn(shape, generator=random, device="cpu") for shape in shapes)
        expected = [_Rotated.apply(x, cos[:, None], sin[:, None]) for x in (query, key)]
        try:
            found = original(query, key, cos, sin)
            return all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(found, expected, strict=True))
        except Exception:  # noqa: BLE001 - whatever it wants, it is another one
            return False


def _rotated(original: Rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
    """As `original`. [B, heads, T, d], [B, kv heads, T, d], [B, T, d], [B, T, d] -> the first two, turned."""
    usual = not others and not named and cos.dim() == 3 and not torch.compiler.is_compiling()
    if not usual or not all(x.dim() == 4 and x.shape[-1] == cos.shape[-1] and x.dtype == cos.dtype for x in (q, k)):
        return original(q, k, cos, sin, *others, **named)
    cos, sin = cos[:, None], sin[:, None]
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)


class _Rotated(torch.autograd.Function):
    """[x1 cos1 - x2 sin1, x2 cos2 + x1 sin2] for halves 1 and 2 of the last dimension. cos and sin are no parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, heads, T, d], [B, 1, T, d], [B, 1, T, d] -> [B, heads, T, d]."""
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        out = gradient * cos
        out[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        out[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return out, None, None
