"""A gang of ranks, and a sum that gives the same bytes on any number of them.

Floating-point addition depends on its order, so the gradients of a step's micro-batches are leaves of one fixed binary
tree. A rank owns a run of leaves and adds up the maximal subtrees that it owns whole; then each rank receives all
subtrees' parts of one slice (all_to_all), finishes the tree there, and the slices are gathered. The cost is that of a
ring all_reduce, and no power of two is asked for.

NCCL runs only inside a step. Everything that may wait for a host (files, evaluation) uses the gloo control group.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tuneward_trainer.nccl import step_timeout

CONTROL_TIMEOUT: Final = datetime.timedelta(hours=2)
"""How long ranks wait while another evaluates, saves or compiles."""

T = TypeVar("T")
Span = tuple[int, int]
"""A subtree: its leaves [first, last)."""


def split(span: Span) -> int:
    """Where a subtree's two halves meet: the left one holds the largest power of two of leaves that is less than all."""
    first, last = span
    return first + (1 << (last - first - 1).bit_length() - 1)


def share(leaves: int, rank: int, world: int) -> range:
    """The leaves of a rank: contiguous, nearly equal in number."""
    return range(leaves * rank // world, leaves * (rank + 1) // world)


def subtrees(span: Span, owned: range) -> list[Span]:
    """The maximal subtrees of `span` whose leaves are all owned, from left to right."""
    first, last = span
    if first >= owned.stop or last <= owned.start:
        return []
    if owned.start <= first and last <= owned.stop:
        return [span]
    middle = split(span)
    return subtrees((first, middle), owned) + subtrees((middle, last), owned)


class TreeSum:
    """Adds parts of the tree over `leaves` leaves as they come, from left to right.

    Holds one partial sum for each maximal subtree seen so far: at most about 2 log2(leaves) vectors.
    """

    def __init__(self, leaves: int) -> None:
        self._root: Span = (0, leaves)
        self._sums: list[tuple[Span, Tensor]] = []

    def add(self, span: Span, value: Tensor) -> None:
        """`value` is the sum over `span`; it is kept and may be added to."""
        while self._sums and self._are_siblings(self._sums[-1][0], span):
            left_span, left = self._sums.pop()
            # IEEE addition is commutative; only its grouping matters.
            span, value = (left_span[0], span[1]), left.add_(value)
        self._sums.append((span, value))

    def _are_siblings(self, left: Span, right: Span) -> bool:
        node = self._root
        while node != (left[0], right[1]):
            middle = split(node) if node[1] - node[0] > 1 else node[0]
            if left[0] >= middle > node[0]:
                node = (middle, node[1])
            elif right[1] <= middle:
                node = (node[0], middle)
            else:
                return False
        return split(node) == right[0]

    @property
    def parts(self) -> list[tuple[Span, Tensor]]:
        return self._sums

    def total(self) -> Tensor:
        ((span, value),) = self._sums
        if span != self._root:
            raise ValueError(f"the sum holds leaves {span} of {self._root}")
        return value


@dataclass(frozen=True)
class Gang:
    """This process's place among the ranks. Rank 0 is the leader."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """gloo; None when there is one rank."""
    model_sharded: bool = False
    """The ranks hold one model between them, so each forward pass is one of all ranks."""
    optimizer_sharded: bool = False
    """Each rank holds its part of what is trained and of the moments, and writes it to a checkpoint."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_tree(self, tree: TreeSum, leaves: int, flags: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
        """(sum over all leaves [size], flags of all ranks [world, F]). `flags` float32 [F] ride along."""
        if self.world == 1:
            return tree.total(), flags[None]
        width = -(-size // self.world)
        counts = [len(subtrees((0, leaves), share(leaves, rank, self.world))) for rank in range(self.world)]
        finished = TreeSum(leaves)
        slices = self._exchange([value for _, value in tree.parts], counts, width)
        for span, value in zip(self._spans(leaves), slices, strict=True):
            finished.add(span, value)
        return self._gather(finished.total(), flags, size)

    def _spans(self, leaves: int) -> list[Span]:
        """All ranks' subtrees, from left to right."""
        return [span for rank in range(self.world) for span in subtrees((0, leaves), share(leaves, rank, self.world))]

    def _exchange(self, own: Sequence[Tensor], counts: list[int], width: int) -> list[Tensor]:
        """Every rank's subtrees, this rank's slice [width] of each, in rank order."""
        sent = torch.zeros(self.world, len(own), width, device=self.device)
        for index, value in enumerate(own):
            for rank in range(self.world):
                part = value[rank * width : (rank + 1) * width]
                sent[rank, index, : len(part)] = part
        received = torch.empty(sum(counts) * width, device=self.device)
        dist.all_to_all_single(
            received,
            sent.flatten(),
            output_split_sizes=[count * width for count in counts],
            input_split_sizes=[len(own) * width] * self.world,
        )
        return list(received.split(width))  # type: ignore[no-untyped-call]

    def _gather(self, part: Tensor, flags: Tensor, size: int) -> tuple[Tensor, Tensor]:
        own = torch.cat([part, flags.to(self.device)])
        everyone = torch.empty(self.world, len(own), device=self.device)
        dist.all_gather_into_tensor(everyone.view(-1), own)
        return everyone[:, : len(part)].reshape(-1)[:size], everyone[:, len(part) :]

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks of a scalar on the device, the same bytes on each."""
        if self.world == 1:
            return value
        everyone = torch.empty(self.world, device=value.device, dtype=value.dtype)
        dist.all_gather_into_tensor(everyone, value.reshape(1))
        return everyone.sum()

    # -- the control group: anything may take its time -----------------------------------------------------------------

    def broadcast(self, value: T) -> T:
        """The leader's value, on every rank. Others pass anything of the same type."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        received: T = box[0]
        return received

    def gather(self, values: list[T]) -> list[T]:
        """All ranks' values in the order of ranks, on every rank."""
        if self.world == 1:
            return values
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, values, group=self.control)
        return [value for box in boxes for value in box]

    def add(self, values: Tensor) -> Tensor:
        """Sum over ranks of a CPU tensor. Exact, whatever the number of ranks, where at most one value is not 0."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def smallest(self, value: int | None) -> int | None:
        """Of all ranks' values; None if this one has none (then no rank has)."""
        if value is None or self.world == 1:
            return value
        values = torch.zeros(self.world, dtype=torch.int64)
        values[self.rank] = value
        return int(self.add(values).min())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Crew:
    """The ranks that write a checkpoint together, in threads beside the training: so they have a group of their own."""

    rank: int
    world: int
    group: dist.ProcessGroup | None
    """gloo; None when there is one rank."""

    @classmethod
    def of(cls, gang: Gang) -> Crew:
        """A collective."""
        return cls(gang.rank, gang.world, _control_group() if gang.world > 1 else None)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, make: Callable[[], list[T]]) -> list[T]:
        """What all ranks make, in the order of ranks, on every rank. Raises OSError on every rank where any could not."""
        own: list[T] | str
        try:
            own = make()
        except Exception as error:  # noqa: BLE001 - the others wait for an answer, whatever it is
            own = f"rank {self.rank}: {error}"
        boxes: list[Any] = [own]
        if self.world > 1:
            boxes = [None] * self.world
            dist.all_gather_object(boxes, own, group=self.group)
        failed = [box for box in boxes if isinstance(box, str)]
        if failed:
            raise OSError(failed[0])
        return [value for box in boxes for value in box]


def join(hang_seconds: int | None = None) -> Gang:
    """Enters the gang that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe (torchrun sets them).
    `hang_seconds`: spec.runPolicy.hangTimeoutSeconds."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        return Gang(0, 1, device)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=step_timeout(hang_seconds), device_id=device)
        return Gang(rank, world, device, _control_group())
    dist.init_process_group("gloo", timeout=step_timeout(hang_seconds))
    return Gang(rank, world, device, _control_group())


def _control_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError("this rank is no member of the control group")
    return group


def be_deterministic() -> None:
    """From here on each kernel of this process gives the same bits for the same input, or raises RuntimeError.

    Attention's backward adds up without atomics then, and cuBLAS splits its sums in one fixed workspace. Before the first
    product on a GPU: cuBLAS reads its setting once.
    """
    # torch prefers its attention from Hopper on, whose backward knows no such order (pytorch#182551); Flash's does.
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # It would write over every fresh tensor, which helps only code that reads what it never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
