"""Batches through as many processes as the machine has processors, and back in their order.

A tokenizer spreads a batch over all processors by itself, but reading, rendering and masks are Python's, one at a time. So
where there is much to do every process has a worker of its own, which sends back arrays. What is on its way at any time is
bounded: memory does not grow with the files.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Final, TypeAlias, cast

from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Batch, Done, Worker

WORTH: Final = 64 << 20
"""Bytes of files from which on the seconds are won back that it takes to start processes."""
_AHEAD: Final = 3
"""Batches of each process that are read and not yet written."""
Pending: TypeAlias = "deque[tuple[Batch, Future[Done]]]"

_worker: Worker
"""Of a process of the crew."""


class Crew:
    """One process by itself, or several."""

    def __init__(self, worker: Worker, pool: ProcessPoolExecutor | None = None, processes: int = 1) -> None:
        self._worker = worker
        self._pool = pool
        self._most = processes * _AHEAD

    def work(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Done]]:
        """Each batch with what became of it, in order. Raises SampleError where `batches` does, behind all before;
        ChildProcessError where a process was killed."""
        if self._pool is None:
            yield from ((batch, self._worker(batch)) for batch in batches)
            return
        pending: Pending = deque()
        broken: SampleError | None = None
        try:
            for batch in batches:
                pending.append((batch, self._pool.submit(_work, batch)))
                if len(pending) == self._most:
                    yield _next(pending)
        except SampleError as error:
            broken = error
        while pending:
            yield _next(pending)
        if broken is not None:
            raise broken


def _next(pending: Pending) -> tuple[Batch, Done]:
    batch, future = pending.popleft()
    try:
        return batch, future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that tokenizes was killed, perhaps for memory") from error


@contextmanager
def crew(worker: Worker, processes: int) -> Iterator[Crew]:
    """`processes`: 1 does all here."""
    if processes == 1:
        yield Crew(worker)
        return
    # Not forked: this process may hold threads of torch, and locks of theirs.
    context = multiprocessing.get_context("spawn")
    # As bytes, so that a process has set itself up before it reads them.
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(pickle.dumps(worker),))
    try:
        yield Crew(worker, pool, processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(worker: bytes) -> None:
    global _worker
    # transformers imports torch where it finds it: two seconds and hundreds of megabytes that no tokenizer needs.
    sys.modules.setdefault("torch", cast("Any", None))
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    # One thread a process: they are as many as there are processors.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = pickle.loads(worker)
    # What is there stays, and samples are freed without the collector: it need not look at them so often.
    gc.freeze()
    gc.set_threshold(100_000)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end us, and nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(batch: Batch) -> Done:
    return _worker(batch)
