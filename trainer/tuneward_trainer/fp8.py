"""A LoRA's frozen weights in fp8 (e4m3, a byte each), which GPUs from Ada and Hopper on multiply as they are.

A weight has one scale an output, and what it is multiplied with one a token, made there and then: the row-wise scales of
torch._scaled_mm, which it takes on CPUs too. Those of weights are powers of two: a weight unpacked to bf16 is exactly the
packed one, and the gradient is that of what was multiplied. Those of tokens make the largest number of each exact: models
have a few that stand far out, and the gradient is nearer where these are not rounded (decision 17).

The gradient of x is dY W, whose sum goes over the outputs, each with another scale of W. So there are two ways. Unpack W
and multiply in the dtype of dY, which rounds nothing more. Or multiply dY by the scales of W first, which is exact too, and
pack it as well (`quick`): dY is rounded to 4 bits, and W is transposed on the way. benchmarks/trainer_gpu.py runs both.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

DTYPE: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(DTYPE).max
_SMALLEST: Final = 1e-30
"""Of a row: rows of zeros, such as the gradient of padding, have a scale too."""
_SIDE: Final = 16
"""Both sides of a weight are multiples of it; GPUs multiply no other ones."""
_CAPABILITY: Final = (8, 9)


class Linear(nn.Linear):
    """Frozen. `weight` fp8 [O, I] times `scale` float32 [O, 1] is W."""

    scale: Tensor

    def __init__(self, plain: nn.Linear, device: torch.device, *, quick: bool) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.dtype, self.quick = plain.weight.dtype, quick
        weight = plain.weight.detach().to(device)
        scale = _power_of_two(_scales(weight))
        self.weight = nn.Parameter((weight / scale).to(DTYPE).contiguous(), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        out: Tensor = _Product.apply(x, self)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer
        return product(x.reshape(-1, x.shape[-1]), layer).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        back = product_back(gradient.reshape(-1, gradient.shape[-1]), ctx.layer)
        return back.view(*gradient.shape[:-1], -1), None


def supported(device: torch.device) -> bool:
    """Whether `device` multiplies fp8."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def pack(model: PeftModel, device: torch.device, *, quick: bool = False) -> None:
    """Replaces what LoRA was put on, one after the other, by packed layers on `device`. After the adapters, whose first
    numbers PEFT would round to the dtype of the weight."""
    for module in list(model.modules()):
        if isinstance(module, lora.Linear) and fits(module.base_layer):
            module.base_layer = Linear(module.base_layer, device, quick=quick)


def fits(layer: nn.Module) -> bool:
    """Whether it can be packed."""
    return type(layer) is nn.Linear and not layer.in_features % _SIDE and not layer.out_features % _SIDE


def unpacked(layer: Linear) -> Tensor:
    """[O, I], in the dtype that was packed, and nothing is rounded."""
    return layer.weight.to(layer.dtype).mul_(layer.scale.to(layer.dtype))


def product(x: Tensor, layer: Linear) -> Tensor:
    """x W' + b: [T, I] -> [T, O], in x's dtype, from x rounded to fp8."""
    return _multiplied(x, layer.weight.t(), layer.scale.t(), layer.bias)


def product_back(rows: Tensor, layer: Linear) -> Tensor:
    """dY W: [T, O] -> [T, I], in dY's dtype; dY is rounded to fp8 where the layer is `quick`."""
    if not layer.quick:
        return rows @ unpacked(layer)
    # Where W is summed over, only the other factor can have its scales. A GPU wants it with the columns one after the other.
    columns = layer.weight.t().contiguous().t()
    return _multiplied(rows * layer.scale.t().to(rows.dtype), columns, layer.scale.new_ones(1, layer.in_features), None)


def _multiplied(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[T, K], packed [K, N] whose columns have the scales float32 [1, N] -> [T, N]. Sums are made as fast as the GPU can:
    the other kernels for row-wise scales are slow (pytorch/ao#1325)."""
    scales = _scales(rows)
    packed = (rows / scales).to(DTYPE).contiguous()
    out: Tensor = torch._scaled_mm(packed, columns, scales, scale, bias, out_dtype=rows.dtype, use_fast_accum=True)
    return out


def _scales(rows: Tensor) -> Tensor:
    """[R, K] -> float32 [R, 1], by which the largest number of a row becomes the largest of fp8."""
    return rows.abs().amax(1, keepdim=True).float().clamp_min(_SMALLEST) / _LARGEST


def _power_of_two(scales: Tensor) -> Tensor:
    """The smallest that is no less. A float32's exponent is its bits 23 to 30; what is none yet carries over into it."""
    return ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
