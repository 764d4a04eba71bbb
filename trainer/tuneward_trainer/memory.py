"""How much goes through the model at once, and what to lower where that was too much: the estimate, applied.

The number of rows in a micro-batch decides how gradients are rounded, so it is a function of the plan alone: on a CPU of
the memory that the job asks for, chosen once by prepare; on GPUs of the smallest one's memory, which prepare cannot know.
"""

from __future__ import annotations

import json
import math
import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tuneward_api.estimate import GIB, Data, Device, Memory, Setup, flops_per_token, memory, tokens_that_fit
from tuneward_api.files import Plan, Prepared
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.quantities import to_bytes
from tuneward_api.resolved import BaseWeights, ResolvedEstimate, ResolvedHyperparameters, ResolvedMethod
from tuneward_api.shape import Shape
from tuneward_trainer.schedule import documents_a_unit

TOKENS_AT_ONCE: Final[dict[Device, int]] = {"cpu": 1024, "cuda": 8192}
"""Tokens of a micro-batch where memory allows them: beyond, kernels get no faster."""
CPU_MEMORY: Final = 4 * GIB
"""What a worker requests when the job names nothing."""
_SHORTEST: Final = 16


@dataclass(frozen=True)
class Choice:
    """How a rank feeds its model."""

    bins: int
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What memory and time depend on, of one job."""

    shape: Shape
    data: Data
    setup: Setup
    hyper: ResolvedHyperparameters
    unit: int = 1
    """Longest documents that a row has room for (schedule.documents_a_unit)."""
    ranks: int = 1
    """Of the gang."""

    @property
    def row(self) -> int:
        """Tokens."""
        return self.unit * self.hyper.sequence_length

    @classmethod
    def of(
        cls,
        shape: Shape,
        method: ResolvedMethod,
        hyper: ResolvedHyperparameters,
        *,
        parameters: int,
        data: Data,
        device: Device,
        unit: int = 1,
        ranks: int = 1,
    ) -> Costs:
        """A frozen base model is one that each of the gang's `ranks` has whole."""
        full = method.type == "Full"
        setup = Setup(
            tokens=0,
            full=full,
            shards=ranks if full else 1,
            rank=method.rank or 0,
            targets=frozenset(method.target_modules) if method.target_modules is not None else None,
            dora=method.type == "DoRA",
            dropout=bool(method.dropout),
            nf4=method.type == "QLoRA",
            device=device,
            parameters=parameters,
            trained=method.trainable_parameters or None,
        )
        return cls(shape=shape, data=data, setup=setup, hyper=hyper, unit=unit, ranks=ranks)

    @property
    def sharded(self) -> Costs:
        """The same with a base model that all ranks share."""
        return replace(self, setup=replace(self.setup, shards=self.ranks))

    def placed(self, weights: BaseWeights | None, room: int | None) -> Costs:
        """As a plan's `base_weights` has it. `room`: bytes of a GPU, by which Auto is decided."""
        apart = weights == "Sharded" or (weights == "Auto" and room is not None and self.too_large(room))
        return self.sharded if apart else self

    def too_large(self, room: int) -> bool:
        """Whether a rank of `room` bytes can do a row of work with its share of a frozen base model, not with all of it."""
        if self.setup.full or self.ranks == 1:
            return False
        fits, shared = self._does_a_row(room), self.sharded._does_a_row(room)
        return shared and not fits and not (self._read_whole and self.memory(Choice(1)).weights > room)

    def _does_a_row(self, room: int) -> bool:
        # Only on GPUs layers are computed twice for want of memory.
        return self.fit(room, recompute=self.setup.device == "cuda") >= self.row

    @property
    def _read_whole(self) -> bool:
        """Whether a rank holds all weights in its memory before it keeps its share: sharded.adapted says why."""
        return self.setup.nf4 or (self.setup.dora and self.setup.device == "cpu")

    def flops(self, choice: Choice) -> float:
        """Of a token."""
        setup = self.setup
        return flops_per_token(self.shape, self.data, setup.rank, setup.targets, recompute=choice.recompute, full=setup.full)

    def fit(self, room: int, *, recompute: bool = False) -> int:
        """Tokens of a micro-batch that fit `room` bytes."""
        return tokens_that_fit(self.shape, self.data, replace(self.setup, recompute=recompute), room)

    def memory(self, choice: Choice) -> Memory:
        """Of one rank that does all of a step's micro-batches."""
        tokens = choice.bins * self.row
        count = max(1, self.hyper.batch_tokens // tokens)
        # Rows are nearly full, and no step has more tokens than a batch.
        at_once = min(tokens, max(self.hyper.batch_tokens, self.row))
        setup = replace(self.setup, tokens=at_once, micro_batches=count, recompute=choice.recompute)
        return memory(self.shape, self.data, setup)

    def choose(self, room: int | None) -> Choice:
        """`room`: bytes; None where the device is not known yet: as many rows as are of any use."""
        length = self.row
        wanted = min(TOKENS_AT_ONCE[self.setup.device], self.hyper.batch_tokens)
        if room is None:
            return Choice(max(1, wanted // length))
        fit = self.fit(room)
        if fit >= length or self.setup.device == "cpu":
            return Choice(max(1, min(wanted, fit) // length))
        fit = self.fit(room, recompute=True)
        return Choice(max(1, min(wanted, fit) // length), recompute=True)


def shape_of(folder: Path) -> Shape | None:
    """Of the model in `folder`; None if its config.json does not say what is needed."""
    try:
        return Shape.of(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError, ZeroDivisionError):
        return None


def statistics(lengths: NDArray[np.int32], target_tokens: int) -> Data:
    """`lengths`: int32 [documents], of which `target_tokens` tokens are learnt."""
    sizes = lengths.astype(np.float64)
    tokens = float(sizes.sum()) or 1.0
    return Data(learnt=min(1.0, target_tokens / tokens), length=float((sizes * sizes).sum()) / tokens)


def estimate(costs: Costs, choice: Choice, tokens: int) -> ResolvedEstimate:
    """`tokens`: of one epoch."""
    needs = costs.memory(choice)
    return ResolvedEstimate(
        memory_bytes=needs.resident,
        weight_bytes=needs.weights,
        state_bytes=needs.state,
        activation_bytes=needs.activations,
        buffer_bytes=max(needs.work, needs.head),
        flops=costs.flops(choice) * tokens * costs.hyper.epochs,
    )


# -- what a worker has ---------------------------------------------------------------------------------------------------


def worker_memory(spec: FineTuneJobSpec) -> int:
    """Bytes that the job gives a worker."""
    resources = spec.workers.resources if spec.workers is not None else None
    limits, requests = (resources.limits or {}, resources.requests or {}) if resources is not None else ({}, {})
    return to_bytes(limits.get("memory", requests.get("memory", CPU_MEMORY)))


def device_of(spec: FineTuneJobSpec) -> Device:
    """Of a job's ranks, where a job on GPUs gets some."""
    gpus = spec.workers.gpus_per_worker if spec.workers is not None else None
    return "cpu" if gpus == 0 else "cuda"


def taken(device: str) -> int:
    """The most bytes that this process has taken so far: of its GPU, or resident."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- where it was too much -----------------------------------------------------------------------------------------------


def ranks_of(spec: FineTuneJobSpec) -> int:
    """Processes of the gang that the job asks for."""
    workers = spec.workers
    if workers is None:
        return 1
    return (workers.replicas or 1) * max(1, 1 if workers.gpus_per_worker is None else workers.gpus_per_worker)


def costs_of(prepared: Prepared, folder: Path, device: Device, ranks: int, room: int | None = None) -> Costs | None:
    """Of a plan, from its model in `folder`, for a gang of `ranks` GPUs of `room` bytes, or of CPU processes. Documents are
    taken to fill their rows, as the lengths are not at hand."""
    shape, summary, hyper = shape_of(folder), prepared.data.summary, prepared.hyperparameters
    if shape is None:
        return None
    data = Data(learnt=min(1.0, summary.target_tokens / max(1, summary.tokens)), length=hyper.sequence_length)
    unit = documents_a_unit(prepared.objective.type)
    return Costs.of(
        shape,
        prepared.method,
        hyper,
        parameters=prepared.base.parameters,
        data=data,
        device=device,
        unit=unit,
        ranks=ranks,
    ).placed(prepared.base_weights, room)


def shares_base(prepared: Prepared, folder: Path, room: int | None, ranks: int) -> bool:
    """Whether the gang's ranks split the frozen base model. `room`: as in `rows`."""
    if prepared.base_weights != "Auto" or room is None:
        return prepared.base_weights == "Sharded" and ranks > 1
    costs = costs_of(prepared, folder, "cuda", ranks, room)
    return costs is not None and costs.setup.shards > 1


def base_weights(spec: FineTuneJobSpec, costs: Costs | None, room: int | None) -> BaseWeights | None:
    """What the job asks for, or what its memory needs; `room`: a CPU worker's. None where no weight is frozen."""
    if spec.method is not None and spec.method.type == "Full":
        return None
    asked = spec.workers.base_weights if spec.workers is not None else None
    if asked is not None:
        return asked
    if costs is None or costs.ranks == 1:
        return "Replicated"
    if room is None:
        return "Auto"
    return "Sharded" if costs.too_large(room) else "Replicated"


def rows(prepared: Prepared, folder: Path, room: int | None, ranks: int = 1) -> Choice:
    """`room`: bytes of the smallest GPU of the gang of `ranks`; None on a CPU, where prepare chose."""
    costs = costs_of(prepared, folder, "cuda", ranks, room) if room is not None else None
    if room is None or costs is None:
        return Choice(prepared.bins_per_micro_batch)
    choice = costs.choose(room)
    return replace(choice, bins=min(choice.bins, prepared.bins_per_micro_batch))


def remedy(plan: Plan, folder: Path, room: int | None) -> str:
    """What to lower, to which value, after memory ran out. `room`: bytes of the GPU; None: a CPU worker has the job's."""
    device: Device = "cpu" if room is None else "cuda"
    workers, ranks = plan.request.spec.workers, ranks_of(plan.request.spec)
    costs, choice = costs_of(plan.prepared, folder, device, ranks, room), rows(plan.prepared, folder, room, ranks)
    if costs is None:
        return "lower spec.hyperparameters.sequenceLength, or give the workers more memory"
    had = worker_memory(plan.request.spec) if room is None else room
    more = math.ceil(1.25 * max(costs.memory(choice).resident, had) / GIB)
    if device == "cuda":
        instead = f"use GPUs with {more} GiB or more"
    else:
        instead = f"raise spec.workers.resources.limits.memory to {more}Gi"
    if costs.setup.full and not costs.fit(had, recompute=choice.recompute):
        # No shorter row mends that.
        replicas = (workers.replicas if workers is not None else None) or 1
        return (
            f"all weights with their gradients and moments take more than a rank's {had / GIB:.3g} GiB: {instead}, raise "
            f"spec.workers.replicas from {replicas}, since ranks share them, or set spec.method.type to LoRA"
        )
    other = _packed(plan.prepared.method.type, costs, choice, had) + _shared(costs, choice, had)
    if costs.fit(had, recompute=choice.recompute) < costs.unit * _SHORTEST:
        lead = f"even rows of {_SHORTEST} tokens need more than a rank's {had / GIB:.3g} GiB"
        return f"{lead}: {other}or {instead}" if other else f"{lead}: {instead}"
    return f"{_smaller(costs, choice, had)}, {other}or {instead}"


def _packed(kind: str, costs: Costs, choice: Choice, room: int) -> str:
    """QLoRA, where it saves a quarter, and what was tried would fit with a quarter to spare."""
    needs = replace(costs, setup=replace(costs.setup, nf4=True)).memory(choice).resident
    if kind != "LoRA" or needs > 0.75 * min(room, costs.memory(choice).resident):
        return ""
    return f"use spec.method.type QLoRA (about {needs / GIB:.1f} GiB), "


def _shared(costs: Costs, choice: Choice, room: int) -> str:
    """A base model that ranks share, or that more of them do, by the same measure."""
    if costs.setup.full:
        return ""
    enough = 0.75 * min(room, costs.memory(choice).resident)
    for ranks in (times * costs.ranks for times in (1, 2, 4, 8)):
        needs = replace(costs, ranks=ranks).sharded.memory(choice).resident
        if needs <= enough:
            wanted = f"raise spec.workers.replicas so that {ranks} ranks share the base model"
            wanted = "set spec.workers.baseWeights to Sharded" if ranks == costs.ranks else wanted
            return f"{wanted} (about {needs / GIB:.1f} GiB each), "
    return ""


def _smaller(costs: Costs, choice: Choice, room: int) -> str:
    """The setting that bounds what goes through the model at once. The estimate has just been wrong, so its answer counts
    only where it is less than half of what was tried."""
    length = costs.row
    tried = min(choice.bins * length, max(costs.hyper.batch_tokens, length))
    value = _rounded(min(costs.fit(room, recompute=choice.recompute), tried // 2))
    if choice.bins > 1 and value >= length:
        return f"lower spec.hyperparameters.batchTokens from {costs.hyper.batch_tokens} to {value}"
    value = _rounded(min(value, length // 2) // costs.unit)
    return f"lower spec.hyperparameters.sequenceLength from {costs.hyper.sequence_length} to {value}"


def _rounded(tokens: int) -> int:
    """Down to a number that people write."""
    step = 256 if tokens >= 1024 else 64 if tokens >= 256 else _SHORTEST
    return max(_SHORTEST, tokens // step * step)
