"""Seven replacements that make a Hugging Face model train fast, and never an own forward pass.

packed-attention  several documents share a row and none sees another (transformers' public cu_seq_lens names)
loss-head         the vocabulary is scored at rows that have a target only, in chunks (loss_head.py)
lora-linear       one autograd node for W x + s B A x, which keeps x and the rank-sized A x, nothing else
gated-mlp         down(act(gate) up) keeps gate and up and computes their product again: half of what an MLP keeps
rms-norm          keeps its result, which the Linears after it keep anyway, and not its input (norms.py)
rotary            turns queries and keys in three passes over memory each way, not eleven (rotary.py)
compiled-layers   each decoder layer by torch.compile, on GPUs (compiled.py); needs packed-attention

There is no code per model family. Instead `verify.py` compares each patch with the plain model on a shrunken twin, and
a patch that disagrees is left out. `applied` is a context manager and restores everything: evaluation by `generate`,
`disable_adapter` and other models of the process must see the plain model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tuneward_trainer import compiled, fp8, loss_head, nf4, norms, rotary
from tuneward_trainer.attention import packed_attention, tell_lengths
from tuneward_trainer.batch import Batch
from tuneward_trainer.loss_head import Head
from tuneward_trainer.model import instance_forward, plain

PACKED_ATTENTION: Final = "packed-attention"
LOSS_HEAD: Final = "loss-head"
LORA_LINEAR: Final = "lora-linear"
GATED_MLP: Final = "gated-mlp"
RMS_NORM: Final = "rms-norm"
ROTARY: Final = "rotary"
COMPILED: Final = "compiled-layers"
ALL: Final = (PACKED_ATTENTION, LOSS_HEAD, LORA_LINEAR, GATED_MLP, RMS_NORM, ROTARY)
"""On every device."""
OF_WHOLE_MODELS: Final = (PACKED_ATTENTION, LOSS_HEAD, ROTARY)
"""Those that do not need adapters."""

_REGISTERED: Final = "tuneward_packed"

Forward = Callable[[Batch], Tensor]
"""Batch -> float32 [R], the log-probability of each target."""


@dataclass(frozen=True)
class Patched:
    """The model's forward pass, and the same for held-out documents."""

    forward: Callable[[Head, Batch], Tensor]
    head: Head
    judge: Head

    def __call__(self, batch: Batch) -> Tensor:
        """float32 [R], the log-probability of each target."""
        return self.forward(self.head, batch)

    def judged(self, batch: Batch) -> Tensor:
        """float32 [2, R]: the log-probability of each target, and 1 where no other token has a higher one. No gradient."""
        return self.forward(self.judge, batch)


@contextmanager
def applied(
    model: PreTrainedModel | PeftModel,
    names: Collection[str] = ALL,
    *,
    recompute: bool = False,
    backend: str | Callable[..., Any] | None = None,
) -> Iterator[Patched]:
    """The model's forward pass with the patches in `names`; outside the block the model is plain again.

    Without packed-attention each document has a forward pass of its own. With `recompute` only the inputs of layers are
    kept, and each is computed again in the backward pass: a third more work, where memory would not do otherwise. `backend`:
    of torch.compile, None for the usual one. Compiled layers take rows of one length (batch.padded).
    """
    base = plain(model)
    with ExitStack() as stack:
        if COMPILED in names:
            stack.enter_context(compiled.compiled_layers(base, backend or compiled.BACKEND))
        if recompute:
            stack.enter_context(_recomputed_layers(base))
        if LORA_LINEAR in names:
            stack.enter_context(_lora_linears(base))
        if GATED_MLP in names:
            stack.enter_context(_gated_mlps(base))
        if RMS_NORM in names:
            stack.enter_context(_rms_norms(base))
        if ROTARY in names:
            stack.enter_context(rotary.patched(base))
        heads: tuple[Head, Head] = (loss_head.plain_head, loss_head.plain_judge)
        if LOSS_HEAD in names:
            heads = stack.enter_context(loss_head.patched(base))
        forward = _forward_alone
        if PACKED_ATTENTION in names:
            stack.enter_context(_attention(base))
            forward = _forward_compiled if COMPILED in names else _forward_packed
        elif COMPILED in names:
            raise ValueError(f"{COMPILED} needs {PACKED_ATTENTION}: documents by themselves are of any length")
        yield Patched(functools.partial(forward, base), *heads)


def _forward_compiled(base: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    compiled.mark(batch.cu)
    return _forward_packed(base, head, batch)


def _forward_packed(base: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    tell_lengths(batch.cu, batch.bounds)
    scored = base(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        cu_seq_lens_q=batch.cu,
        cu_seq_lens_k=batch.cu,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
        logits_to_keep=batch.rows,
        use_cache=False,
    ).logits[0]
    return head(scored, batch.targets)


def _forward_alone(base: PreTrainedModel, head: Head, batch: Batch) -> Tensor:
    """Document after document, as at inference. Right for every model, also where states cross a packed row."""
    parts = []
    for document in range(batch.documents):
        start, stop = batch.bounds[document : document + 2]
        rows = slice(*batch.row_bounds[document : document + 2])
        scored = base(input_ids=batch.ids[None, start:stop], logits_to_keep=batch.rows[rows] - start, use_cache=False)
        parts.append(head(scored.logits[0], batch.targets[rows]))
    return torch.cat(parts, -1)


# -- packed attention ------------------------------------------------------------------------------------------------


@contextmanager
def _attention(base: PreTrainedModel) -> Iterator[None]:
    # The documents' bounds are the mask. None is registered: transformers then makes none and asks nothing of the positions,
    # which would make the host wait for the device in each forward pass.
    AttentionInterface.register(_REGISTERED, packed_attention)
    before = base.config._attn_implementation
    base.set_attn_implementation(_REGISTERED)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


# -- LoRA ------------------------------------------------------------------------------------------------------------


@contextmanager
def _lora_linears(base: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in base.modules():
            if fits_lora_linear(module):
                stack.enter_context(instance_forward(module, functools.partial(_lora_forward, module)))
        yield


def fits_lora_linear(module: Any) -> bool:
    """Plain LoRA on a Linear, whose weight is a matrix or packed as NF4 or fp8, no dropout. Everything else keeps PEFT's own
    forward pass."""
    return (
        # The second one is there where PEFT found bitsandbytes.
        type(module) in (lora.Linear, getattr(lora, "Linear4bit", lora.Linear))
        and (
            type(module.base_layer) is nn.Linear or nf4.is_packed(module.base_layer) or type(module.base_layer) is fp8.Linear
        )
        and not module.base_layer.weight.requires_grad
        and not module.lora_variant
        and not module.fan_in_fan_out
        and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
        and not any(layer.bias is not None for layer in module.lora_B.values())
    )


def _lora_forward(module: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
    if others or named or module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        plain: Tensor = type(module).forward(module, x, *others, **named)
        return plain
    name = module.active_adapters[0]
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    out: Tensor = _LoraLinear.apply(x, a, b, module.base_layer, scale)
    return out


class _LoraLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' for x [..., I], A [r, I], B [O, r], W [O, I]; computed in x's dtype, A and B in theirs. `base`
    is the frozen Linear, whose weight is asked for in both passes: unpacked it is not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, down = _with_lora(flat, a, b, base, scale)
        ctx.save_for_backward(flat, down, a, b)
        ctx.base, ctx.scale = base, scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        flat, down, a, b = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_a, to_b = _lora_gradients(rows, flat, down, a, b, ctx.base, ctx.scale, to_x=ctx.needs_input_grad[0])
        return None if to_x is None else to_x.view(*gradient.shape[:-1], -1), to_a, to_b, None, None


def _weight(base: nn.Linear) -> Tensor:
    """[O, I]."""
    return nf4.unpacked(base) if nf4.is_packed(base) else base.weight


def _product(flat: Tensor, base: nn.Linear) -> Tensor:
    """x W' + b: [T, I] -> [T, O]."""
    if isinstance(base, fp8.Linear):
        return fp8.product(flat, base)
    return nn.functional.linear(flat, _weight(base), base.bias)


def _product_back(rows: Tensor, base: nn.Linear) -> Tensor:
    """dY W: [T, O] -> [T, I]."""
    return fp8.product_back(rows, base) if isinstance(base, fp8.Linear) else rows @ _weight(base)


def _with_lora(flat: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scale: float) -> tuple[Tensor, Tensor]:
    """[T, I] -> the result [T, O], and x A' [T, r], which the backward pass needs."""
    down = flat @ a.to(flat.dtype).T
    out = _product(flat, base)
    return out.addmm_(down, b.to(flat.dtype).T, alpha=scale), down


def _lora_gradients(
    rows: Tensor, flat: Tensor, down: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scale: float, *, to_x: bool = True
) -> tuple[Any, Tensor, Tensor]:
    """Gradient of the result [T, O] -> gradients of x [T, I] (None unless asked for), A and B."""
    up = (rows @ b.to(rows.dtype)).mul_(scale)
    back = _product_back(rows, base).addmm_(up, a.to(rows.dtype)) if to_x else None
    return back, (up.T @ flat).to(a.dtype), (rows.T @ down).mul_(scale).to(b.dtype)


# -- gated MLP -------------------------------------------------------------------------------------------------------


@contextmanager
def _gated_mlps(base: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in base.modules():
            if fits_gated_mlp(module):
                stack.enter_context(instance_forward(module, functools.partial(_gated_forward, module)))
        yield


def fits_gated_mlp(module: nn.Module) -> bool:
    """It has the parts of down(act(gate(x)) up(x)), under the names that nearly all models give them, and LoRA on the
    last. Whether it is this function, and not one with a clamp or a scale, is for verify() to find out."""
    parts = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    return parts and fits_lora_linear(module.down_proj)


def _gated_forward(module: Any, x: Tensor) -> Tensor:
    down = module.down_proj
    # A compiler finds out by itself what is cheaper made again than kept.
    if torch.compiler.is_compiling() or down.disable_adapters or down.merged or len(down.active_adapters) != 1:
        plain: Tensor = type(module).forward(module, x)
        return plain
    name = down.active_adapters[0]
    a, b, scale = down.lora_A[name].weight, down.lora_B[name].weight, down.scaling[name]
    out: Tensor = _GatedDown.apply(module.gate_proj(x), module.up_proj(x), module.act_fn, a, b, down.base_layer, scale)
    return out


class _GatedDown(torch.autograd.Function):
    """_LoraLinear of act(gate) * up, which is computed again in the backward pass: cheap beside the products."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        act: Callable[[Tensor], Tensor],
        a: Tensor,
        b: Tensor,
        base: nn.Linear,
        scale: float,
    ) -> Tensor:
        """gate and up [..., I], A [r, I], B [O, r], W [O, I]."""
        opened = act(gate)
        inner = torch.mul(opened, up, out=None if opened is gate else opened)
        out, down = _with_lora(inner.view(-1, gate.shape[-1]), a, b, base, scale)
        ctx.save_for_backward(gate, up, down, a, b)
        ctx.act, ctx.base, ctx.scale = act, base, scale
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down, a, b = ctx.saved_tensors
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            opened = ctx.act(gate)
        inner = opened.detach() * up
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        to_inner, to_a, to_b = _lora_gradients(rows, inner.view(-1, inner.shape[-1]), down, a, b, ctx.base, ctx.scale)
        to_inner = to_inner.view(gate.shape)
        to_up = torch.mul(to_inner, opened.detach(), out=inner)
        (to_gate,) = torch.autograd.grad(opened, gate, to_inner.mul_(up))
        return to_gate, to_up, None, to_a, to_b, None, None


# -- norms -----------------------------------------------------------------------------------------------------------


@contextmanager
def _rms_norms(base: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in base.modules():
            if norms.fits(module):
                known = norms.invertible(module)
                stack.enter_context(instance_forward(module, functools.partial(norms.forward, module, known)))
        yield


# -- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def _recomputed_layers(base: nn.Module) -> Iterator[None]:
    """transformers' own switch works in training mode only, which would turn on the base model's dropout."""
    with ExitStack() as stack:
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):
                again = functools.partial(checkpoint, module.forward, use_reentrant=False)
                stack.enter_context(instance_forward(module, again))
        yield
