"""Continuous batches: the thread that owns the model.

Texts join and leave between steps. A prompt runs alone, in pieces, unpadded, so that its log-probabilities are those
of a plain forward; then its keys and values join the batch, padded on the left, with a mask and positions that hide
the padding. Rows of different adapters share every forward.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import DynamicCache

from tuneward_serving.engine.errors import INTERNAL, ApiError
from tuneward_serving.engine.generation import Generation, Scored
from tuneward_serving.engine.runner import Runner
from tuneward_serving.engine.sampling import choose, generator_for, score

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK = 256
"""Tokens of a prompt in one forward: bounds the logits of a prompt whose log-probabilities are asked for."""


@dataclass(eq=False)
class Row:
    """A text in the batch. `next` is the token that was chosen and is not yet in the cache."""

    work: Generation
    generator: torch.Generator
    next: int
    cached: int


class Batcher:
    """`run` belongs on a thread of its own; `submit`, `call` and `stop` may come from any."""

    def __init__(self, runner: Runner, *, max_rows: int = 16, max_cells: int = 32_768) -> None:
        """`max_cells`: rows x longest text, which bounds the memory of keys and values."""
        self._runner = runner
        self._max_rows = max_rows
        self._max_cells = max_cells
        self._inbox: queue.SimpleQueue[Generation | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Generation] = deque()
        self._rows: list[Row] = []
        self._cache = DynamicCache()
        self._retired: set[str] = set()

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, work: Generation) -> None:
        self._inbox.put(work)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` between two steps, where nothing else touches the model."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for the future
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def retire(self, slot: str) -> None:
        """Unloads an adapter as soon as no text uses it: those under way end as they began."""
        self._inbox.put(lambda: self._retired.add(slot))

    def stop(self) -> None:
        self._inbox.put(None)

    def run(self) -> None:
        while self._take_in():
            self._drop(lambda row: row.work.finished or row.work.cancelled)
            self._unload_retired()
            self._admit()
            if self._rows:
                self._guard(self._step, [row.work for row in self._rows])

    def _unload_retired(self) -> None:
        used = {work.slot for work in (*self._waiting, *(row.work for row in self._rows))}
        for slot in self._retired - used:
            self._retired.remove(slot)
            self._runner.unload(slot)

    def _take_in(self) -> bool:
        """Everything that arrived; waits for it when there is nothing else to do. False: stop."""
        block = not self._waiting and not self._rows
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if item is None:
                return False
            if isinstance(item, Generation):
                self._waiting.append(item)
            else:
                item()

    def _admit(self) -> None:
        while self._waiting:
            work = self._waiting[0]
            if not work.cancelled and not self._fits(work):
                return
            self._waiting.popleft()
            if not work.cancelled:
                self._guard(lambda work=work: self._start(work), [work])  # type: ignore[misc]

    def _fits(self, work: Generation) -> bool:
        if not self._rows:
            return True
        longest = max(len(work.prompt), *(row.cached for row in self._rows)) + 1
        return len(self._rows) < self._max_rows and (len(self._rows) + 1) * longest <= self._max_cells

    def _guard(self, action: Callable[[], None], works: list[Generation]) -> None:
        """An error ends the texts at hand, not the engine; those that it did not touch go on."""
        try:
            action()
        except Exception as error:
            log.exception("a forward failed")
            for work in works:
                if not work.finished:
                    work.fail(error if isinstance(error, ApiError) else ApiError(INTERNAL, status=500))
            self._drop(lambda row: row.work.finished)

    def _start(self, work: Generation) -> None:
        """The prompt's forward, and the first token."""
        cache = DynamicCache()
        scored, logits = self._prefill(work, cache)
        generator = generator_for(work.sampling)
        row = Row(work, generator, choose(logits, work.sampling, generator), len(work.prompt))
        self._give(row, logits, scored)
        if not work.finished:
            self._cache = joined(self._cache, cache) if self._rows else cache
            self._rows.append(row)

    def _prefill(self, work: Generation, cache: DynamicCache) -> tuple[tuple[Scored, ...] | None, torch.Tensor]:
        """(the prompt's own tokens from the second on, scored, when asked for; logits after its last token)."""
        device, prompt_top = self._runner.device, work.sampling.prompt_top
        ids = torch.tensor([list(work.prompt)], device=device)
        scored: list[Scored] = []
        logits = torch.empty(0)
        for start in range(0, ids.shape[1], CHUNK):
            part = ids[:, start : start + CHUNK]
            end = start + part.shape[1]
            logits = self._runner.forward(
                part,
                mask=torch.ones((1, end), dtype=torch.long, device=device),
                positions=torch.arange(start, end, device=device)[None],
                cache=cache,
                slots=[work.slot],
                keep=1 if prompt_top is None else 0,
            )[0]
            if prompt_top is not None:
                following = work.prompt[start + 1 : end + 1]
                scored += [score(logits[i], token, prompt_top) for i, token in enumerate(following)]
        return (None if prompt_top is None else tuple(scored)), logits[-1]

    def _step(self) -> None:
        """One token for every row."""
        width = max(row.cached for row in self._rows) + 1
        device = self._runner.device
        used = torch.tensor([[row.cached + 1] for row in self._rows], device=device)
        logits = self._runner.forward(
            torch.tensor([[row.next] for row in self._rows], device=device),
            mask=(torch.arange(width, device=device)[None] >= width - used).long(),
            positions=used - 1,
            cache=self._cache,
            slots=[row.work.slot for row in self._rows],
            keep=1,
        )[:, -1]
        for row, own in zip(self._rows, logits, strict=True):
            row.cached += 1
            row.next = choose(own, row.work.sampling, row.generator)
            self._give(row, own, None)

    def _give(self, row: Row, logits: torch.Tensor, prompt: tuple[Scored, ...] | None) -> None:
        top = row.work.sampling.top
        if top is None:
            row.work.accept(Scored(token=row.next, logprob=0.0, rank=0), prompt)
        else:
            row.work.accept(score(logits, row.next, top), prompt)

    def _drop(self, gone: Callable[[Row], bool]) -> None:
        """Takes rows out of the batch, and the padding that only they needed."""
        kept = [index for index, row in enumerate(self._rows) if not gone(row)]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        longest = max((row.cached for row in self._rows), default=0)
        self._cache = selected(self._cache, kept, longest) if kept else DynamicCache()


def joined(left: DynamicCache, right: DynamicCache) -> DynamicCache:
    """Rows of both, keys and values [rows, heads, positions, width] padded on the left to the same length."""
    length = max(left.get_seq_length(), right.get_seq_length())
    return DynamicCache(
        [
            (
                torch.cat([_padded(a.keys, length), _padded(b.keys, length)]),
                torch.cat([_padded(a.values, length), _padded(b.values, length)]),
            )
            for a, b in zip(left.layers, right.layers, strict=True)
        ]
    )


def selected(cache: DynamicCache, rows: list[int], length: int) -> DynamicCache:
    """These rows, their last `length` positions."""
    return DynamicCache(
        [(layer.keys[rows, :, -length:].clone(), layer.values[rows, :, -length:].clone()) for layer in cache.layers]
    )


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))
