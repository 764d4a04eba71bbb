"""Root-mean-square norms that keep what they give, not what they take.

The Linears after a norm keep its result anyway, for the gradient of their LoRA matrices. Its input can be had from that
result again but for the scale of its row, so kept beside it, as autograd does, it is about a seventh of all that a layer
keeps. In float32 only: in bf16 the result has lost bits that the gradient wants, and there a compiler decides what to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


def fits(module: nn.Module) -> bool:
    """Llama's norm, whatever family it is in: its name for epsilon tells it from those that add 1 to their weight. Whether
    it is this function is for verify() to find out."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def invertible(module: nn.Module) -> bool | None:
    """Whether a row can be had from its result again: no weight is nothing, or so little that products lose bits. Asked
    once, as a frozen weight stays what it is; None of a shard, which tells it only when it is gathered."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.requires_grad or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    return None if isinstance(weight, DTensor) else bool(weight.detach().abs().amin() > 1e-20)


def forward(module: Any, known: bool | None, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """In place of `module`'s own, which still is what others, and whatever this cannot do, get. `known`: what `invertible`
    said."""
    if others or named or torch.compiler.is_compiling() or not x.requires_grad or x.dtype != torch.float32:
        known = False
    if known or (known is None and invertible(module)):
        out: Tensor = _Norm.apply(x, module)
        return out
    plain: Tensor = type(module).forward(module, x, *others, **named)
    return plain


class _Norm(torch.autograd.Function):
    """y = w n for n = x / rms(x). With g' the gradient of y: that of x is (w g' - n mean(g' y)) / rms(x), and n = y / w.
    `module` is asked for its weight in both passes, as it may be gathered for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        """[..., H] -> [..., H]."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(module.variance_epsilon).rsqrt_()
        out = torch.mul(x, scale).mul_(module.weight)
        ctx.save_for_backward(out, scale)
        ctx.module = module
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        weight = ctx.module.weight
        buffer = gradient * out
        mean = buffer.mean(-1, keepdim=True)
        normed = torch.div(out, weight, out=buffer)
        to_x = gradient * weight
        return to_x.addcmul_(normed, mean, value=-1).mul_(scale), None
