"""forward_backward, optim_step, save, load: what every way of training is made of.

All trained numbers lie in one flat buffer, and so do their gradients: a step's reduction, its norm and its AdamW are
one operation each instead of hundreds, and PEFT's parameters are views into them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from torch import Tensor

from tuneward_trainer.batch import Batch
from tuneward_trainer.losses import Loss
from tuneward_trainer.model import set_dropout, trainable
from tuneward_trainer.patches import Forward

BETAS: Final = (0.9, 0.95)
_BLOCK: Final = 4096
"""The buffer's length is a multiple of it: norms are sums of sums over blocks, whose order no thread count changes."""

State = dict[str, Tensor]
"""Name -> CPU tensor: `<parameter>`, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`."""


@dataclass(frozen=True)
class Output:
    """Of one micro-batch: its part of the step's loss and of the loss's other figures, [F], and [R] log-probabilities of
    the targets. On the device."""

    figures: Tensor
    logprobs: Tensor

    @property
    def loss(self) -> Tensor:
        return self.figures[0]


class Engine:
    """Trains what of `model` requires a gradient. `forward` is the model's, patched or not (patches.applied)."""

    def __init__(self, model: PeftModel, *, weight_decay: float, max_grad_norm: float, idle: Batch | None = None) -> None:
        """`idle`: on the device, with weights of 0, where a pass is one of all ranks (Gang.model_sharded)."""
        self.model = model
        self._idle = idle
        self.max_grad_norm = max_grad_norm
        self.step = 0
        self._shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
        self._flat, self.gradient = _flatten(model)
        self._optimizer = torch.optim.AdamW(
            [self._flat], lr=0.0, betas=BETAS, weight_decay=weight_decay, fused=self._flat.is_cuda, foreach=False
        )

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape of everything that is trained."""
        return {name: list(shape) for name, shape in self._shapes.items()}

    def forward_backward(self, forward: Forward, batch: Batch, loss: Loss, *, seed: int | None = None) -> Output:
        """Adds the gradient of `loss` over `batch` to `gradient`. A batch without targets adds nothing."""
        if not len(batch.rows):
            self.idle(forward)
            return Output(self.gradient.new_zeros(len(loss.figures)), self.gradient.new_zeros(0))
        if seed is not None:
            set_dropout(self.model, on=True)
            torch.manual_seed(seed)
        try:
            logprobs = forward(batch)
            figures = loss(logprobs, batch)
            torch.autograd.backward(figures[0])
        finally:
            if seed is not None:
                set_dropout(self.model, on=False)
        return Output(figures.detach(), logprobs.detach())

    def idle(self, forward: Forward) -> None:
        """A pass for the others' sake, which teaches nothing; none where a pass is this rank's own matter."""
        if self._idle is not None:
            pass_through(forward, self._idle)

    def optim_step(self, learning_rate: float, gradient: Tensor) -> Tensor:
        """One AdamW step along `gradient`, clipped to `max_grad_norm`. Returns the norm before that, on the device."""
        norm = block_norm(gradient)
        scale = self.max_grad_norm / (norm + 1e-6)
        self.gradient.copy_(gradient).mul_(scale.clamp(max=1.0))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self.gradient.zero_()
        self.step += 1
        return norm

    def save(self) -> State:
        """A copy of all that the rest of the training depends on, but for the step."""
        state = self._named(self._flat.detach(), "")
        for key in ("exp_avg", "exp_avg_sq"):
            moments = self._optimizer.state[self._flat].get(key)
            state |= self._named(torch.zeros_like(self._flat) if moments is None else moments, f"{key}.")
        return state

    def load(self, state: State | Path, step: int) -> None:
        """Goes on from `save()` of another process. Raises KeyError or RuntimeError for another model's state."""
        if isinstance(state, Path):
            raise TypeError(f"{state} holds the shards of a whole model")
        with torch.no_grad():
            self._flat.copy_(self._joined(state, ""))
        self._optimizer.state[self._flat] = {
            # On the CPU whatever the device, as AdamW itself has it; fused AdamW wants it on the device.
            "step": torch.tensor(float(step), device=self._flat.device if self._flat.is_cuda else "cpu"),
            "exp_avg": self._joined(state, "exp_avg."),
            "exp_avg_sq": self._joined(state, "exp_avg_sq."),
        }
        self.step = step

    def _named(self, flat: Tensor, prefix: str) -> State:
        state, start = {}, 0
        for name, shape in self._shapes.items():
            part = flat[start : start + math.prod(shape)]
            # Onto the host in any case, and never a view of the live buffer.
            state[prefix + name] = part.view(shape).to("cpu", copy=True)
            start += part.numel()
        return state

    def _joined(self, state: State, prefix: str) -> Tensor:
        flat, start = torch.zeros_like(self._flat), 0
        for name, shape in self._shapes.items():
            part = flat[start : start + math.prod(shape)]
            part.view(shape).copy_(state[prefix + name])
            start += part.numel()
        return flat


def _flatten(model: PeftModel) -> tuple[Tensor, Tensor]:
    """(parameters, gradients) float32 [multiple of _BLOCK]; the model's parameters become views into them."""
    parameters = list(trainable(model).values())
    count = sum(parameter.numel() for parameter in parameters)
    size = -(-count // _BLOCK) * _BLOCK
    flat = torch.zeros(size, device=parameters[0].device)
    gradient = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        flat[start:end].view_as(parameter).copy_(parameter.detach())
        parameter.data = flat[start:end].view_as(parameter)
        parameter.grad = gradient[start:end].view_as(parameter)
        start = end
    flat.grad = gradient
    return flat.requires_grad_(), gradient


def pass_through(forward: Forward, idle: Batch) -> None:
    """Forward and backward of a batch whose weights are 0: other ranks wait for this one's shards."""
    torch.autograd.backward((forward(idle) * idle.weights).sum())


def block_norm(flat: Tensor) -> Tensor:
    """Euclidean norm of a float32 vector whose length is a multiple of _BLOCK."""
    return flat.view(-1, _BLOCK).square().sum(1).sum().sqrt()
