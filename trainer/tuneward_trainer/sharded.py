"""Models that ranks hold together: FSDP2 (torch.distributed.fsdp.fully_shard), a group for each decoder layer and one
for what lies around them. A forward pass is a collective of all ranks, so each makes as many as the others: who has
nothing left to do passes a batch of weight 0 through (session.idles).

A frozen base model: each rank keeps its share, and has the adapters whole. FSDP only gathers frozen bytes, so
`engine.Engine` trains these as it does with a whole base model, and gets the same bytes.

Full fine-tuning: every weight of the text part is trained, and each rank holds its shard of weights, gradients and
moments. On a GPU shards are float32 and layers are gathered in bf16; on a CPU all is float32. A step's gradient is a
sum over ranks by reduce-scatter, whose order depends on their number: the same number of ranks gives the same bytes,
another one the same up to rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tuneward_api.resolved import MethodType
from tuneward_trainer.batch import Batch
from tuneward_trainer.distributed import Gang
from tuneward_trainer.engine import BETAS, Output, State, pass_through
from tuneward_trainer.losses import Loss
from tuneward_trainer.model import computed_in, decoder_layers, load_base, load_to_share, trainable
from tuneward_trainer.patches import Forward

_M_MMAP_THRESHOLD: Final = -3
"""Of malloc.h."""
MOMENTS: Final = ("exp_avg", "exp_avg_sq")


def adapted(folder: Path, add: Callable[[PreTrainedModel], PeftModel], gang: Gang, kind: MethodType) -> PeftModel:
    """The model of `folder`, frozen and split over the gang, with the adapters of this kind that `add` puts on it."""
    dtype = computed_in(gang.device)
    if kind == "LoRA":
        # On a CPU a layer gets its dtype as it is split: fp32 of a whole model would be twice its bf16 file.
        base = load_to_share(folder, dtype, weights=None if gang.device.type == "cpu" else dtype)
        return add(share(base, gang, dtype=dtype if gang.device.type == "cpu" else None))
    # DoRA begins with the norms of whole weights, and what packs weights packs whole ones.
    whole = load_base(folder, gang.device, packed=True) if kind == "QLoRA" else load_to_share(folder, dtype, weights=dtype)
    model = add(whole)
    share(whole, gang)
    return model


def share(base: PreTrainedModel, gang: Gang, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Splits a frozen base model over the gang, layer by layer, each of which becomes `dtype` first; adapters stay whole on
    each rank, and so do the scales of packed weights, which are bytes."""
    mesh, adapters = init_device_mesh(gang.device.type, (gang.world,)), set(trainable(base).values())
    if gang.device.type == "cpu":
        _free_weights_at_once(base)
    for module in (*decoder_layers(base), base):
        if dtype is not None:
            _convert(module, dtype)
        fully_shard(module, mesh=mesh, ignored_params=adapters)
    for parameter in adapters:
        parameter.data = parameter.data.to(gang.device)
    return base


def _free_weights_at_once(base: PreTrainedModel) -> None:
    """What is gathered of a layer shall go back to the system at once. glibc keeps freed blocks below a threshold that rises
    to 32 MiB, and finds no use for them where the next request is 64 bytes larger, as an aligned one is: in three passes
    that took as much again as the model itself. Larger matrices never had to be asked for."""
    largest = max(4 * parameter.numel() for layer in decoder_layers(base) for parameter in layer.parameters())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, min(max(largest // 16, 1 << 20), 32 << 20))


def _convert(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Its weights, but for those that are split already."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)


def shard(
    model: PreTrainedModel, gang: Gang, *, first: Callable[[torch.nn.Module], object] = torch.nn.Module.float
) -> PreTrainedModel:
    """Splits the model's parameters over the gang; layer by layer, so that no device ever holds it whole. `first` is done
    with each part before, and leaves it in float32."""
    if not dist.is_initialized():
        backend = "nccl" if gang.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(gang.device.type, (gang.world,))
    policy = MixedPrecisionPolicy()
    if gang.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*decoder_layers(model), model):
        first(part)
        _shard_one(part, mesh, policy)
    return model


def _shard_one(module: torch.nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    group = fully_shard(module, mesh=mesh, mp_policy=policy)
    # A loss is divided by all of its step's weights, so gradients are added up; and gloo knows no other reduction.
    group.set_gradient_divide_factor(1.0)
    group.set_force_sum_reduction_for_comms(True)


class ShardedEngine:
    """As `engine.Engine`, of a model that `shard` has split. Of its gradients nothing is left to reduce."""

    def __init__(
        self, model: PreTrainedModel, gang: Gang, *, weight_decay: float, max_grad_norm: float, idle: Batch
    ) -> None:
        self.model = model
        self.max_grad_norm = max_grad_norm
        self.step = 0
        self.gradient = torch.zeros(0, device=gang.device)
        self._gang = gang
        self._idle = idle.to(gang.device)
        self._parameters = trainable(model)
        self._optimizer = torch.optim.AdamW(
            _decayed(self._parameters.values(), weight_decay), lr=0.0, betas=BETAS, fused=True
        )
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=gang.device),
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name -> shape of everything that is trained."""
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    def forward_backward(self, forward: Forward, batch: Batch, loss: Loss, *, seed: int | None = None) -> Output:
        """Adds the gradient of `loss` over `batch` to the shards. A batch without targets is a pass for the others' sake."""
        if seed is not None:
            raise TypeError("there is no dropout without adapters")
        if not batch.documents:
            self.idle(forward)
            return Output(self.gradient.new_zeros(len(loss.figures)), self.gradient.new_zeros(0))
        logprobs = forward(batch)
        figures = loss(logprobs, batch)
        torch.autograd.backward(figures[0])
        return Output(figures.detach(), logprobs.detach())

    def idle(self, forward: Forward) -> None:
        """A pass for the others' sake, which teaches nothing."""
        pass_through(forward, self._idle)

    def optim_step(self, learning_rate: float, gradient: Tensor) -> Tensor:
        """One AdamW step along the shards' gradients, clipped to `max_grad_norm`. Returns the norm before that."""
        if len(gradient):
            raise TypeError("the gradient lies in the shards")
        shards = [_local(parameter.grad) for parameter in self._parameters.values() if parameter.grad is not None]
        norm = self._gang.total(torch.stack(torch._foreach_norm(shards)).square().sum()).sqrt()
        torch._foreach_mul_(shards, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.refresh()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm

    def refresh(self) -> None:
        """What a pass without a gradient has left gathered would be stale after a change of the shards."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def save(self) -> State:
        """A copy of this rank's shards of all that the rest of the training depends on, but for the step."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._state().items()}

    def load(self, folder: State | Path, step: int) -> None:
        """Goes on from what `save()` gave on any number of ranks, as torch.distributed.checkpoint wrote it."""
        if isinstance(folder, dict):
            raise TypeError("this is the checkpoint of an adapter")
        self.refresh()
        load_shards(
            {name: tensor.detach() for name, tensor in self._state().items()},
            storage_reader=FileSystemReader(folder),
            process_group=self._gang.control,
            no_dist=self._gang.world == 1,
        )
        for state in self._optimizer.state.values():
            state["step"].fill_(step)
        self.step = step

    def whole(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All of the model's tensors, whole, in the host's memory of the leader; others get none. A collective. Weights that
        are one and the same come once."""
        self.refresh()
        own, named = dict(self.model.named_parameters()), dict(self.model.named_parameters(remove_duplicate=False))
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if name not in named}
        found = {}
        for name, tensor in (own | buffers).items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._gang.leads:
                found[name] = full.detach().to("cpu", dtype if full.is_floating_point() else full.dtype, copy=True)
        return found

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = dict(self._parameters)
        for moment in MOMENTS:
            state |= {f"{moment}.{name}": self._optimizer.state[own][moment] for name, own in self._parameters.items()}
        return state


def _decayed(parameters: Any, weight_decay: float) -> Sequence[dict[str, Any]]:
    """Matrices decay towards 0; norms and biases do not."""
    both = list(parameters)
    return [
        {"params": [one for one in both if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in both if one.ndim < 2], "weight_decay": 0.0},
    ]


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found
