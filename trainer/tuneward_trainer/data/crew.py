"""Batches through as many processes as the machine has processors, and back in their order.

A tokenizer spreads a batch over all processors by itself, but reading, rendering and masks are Python's, one at a time. So
where there is much to do every process has a worker of its own, which sends back arrays. What is on its way at any time is
bounded: memory does not grow with the files.

Each process has a thread here that asks it and a connection that nobody else has: no lock is shared, so one that is killed
or stands still keeps nothing waiting but its thread. (concurrent.futures' pool of processes was seen to wait for ever, and
its end waits with it.)
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final, TypeAlias, cast

from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Batch, Done, Worker

WORTH: Final = 64 << 20
"""Bytes of files from which on the seconds are won back that it takes to start processes."""
_AHEAD: Final = 3
"""Batches of each process that are read and not yet written."""
_PATIENCE: Final = 600.0
"""Seconds for one batch, whose work is a second's, and for a process to start, perhaps from a store far away."""
Pending: TypeAlias = "deque[tuple[Batch, Future[Done]]]"


class Member:
    """One process with a worker."""

    def __init__(self, worker: bytes) -> None:
        # Not forked: this process may hold threads of torch, and locks of theirs.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with theirs:  # closed here, so that its end is seen
            self._process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        assert self._process.pid is not None
        self.id: Final = self._process.pid
        self._worker: bytes | None = worker

    def ask(self, batch: Batch) -> Done:
        """What became of it. Raises ChildProcessError where the process was killed, and what its worker raises."""
        try:
            if self._worker is not None:
                # Behind all that a process needs to start: as bytes, so that it has set itself up before it reads them.
                self._connection.send_bytes(self._worker)
                self._worker = None
            self._connection.send(batch)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError("a process that tokenizes was killed, perhaps for memory") from error
        if isinstance(answer, BaseException):
            raise answer
        return cast("Done", answer)

    def end(self) -> None:
        """It holds nothing that is not sent: it need not be asked."""
        self._process.kill()
        self._process.join()
        self._process.close()

    def close(self) -> None:
        """When nobody asks any more; a process that still runs ends by itself."""
        self._connection.close()


class Crew:
    """One process by itself, or several."""

    def __init__(self, worker: Worker, members: list[Member], threads: ThreadPoolExecutor | None = None) -> None:
        self._worker = worker
        self.members = members
        self._threads = threads
        self._idle: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for member in members:
            self._idle.put(member)

    def work(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Done]]:
        """Each batch with what became of it, in order. Raises SampleError where `batches` does, behind all before;
        ChildProcessError where a process was killed or stands still."""
        if self._threads is None:
            yield from ((batch, self._worker(batch)) for batch in batches)
            return
        pending: Pending = deque()
        broken: SampleError | None = None
        try:
            for batch in batches:
                pending.append((batch, self._threads.submit(self._ask, batch)))
                if len(pending) == len(self.members) * _AHEAD:
                    yield _next(pending)
        except SampleError as error:
            broken = error
        while pending:
            yield _next(pending)
        if broken is not None:
            raise broken

    def _ask(self, batch: Batch) -> Done:
        member = self._idle.get()  # there are as many as threads
        try:
            return member.ask(batch)
        finally:
            self._idle.put(member)


def _next(pending: Pending) -> tuple[Batch, Done]:
    batch, future = pending.popleft()
    try:
        return batch, future.result(_PATIENCE)
    except TimeoutError as error:
        first, last = batch.records[0][0], batch.records[-1][0]
        raise ChildProcessError(
            f"a process that tokenizes made nothing of lines {first} to {last} in {_PATIENCE:.0f} s; run it again"
        ) from error


@contextmanager
def crew(worker: Worker, processes: int) -> Iterator[Crew]:
    """`processes`: 1 does all here."""
    if processes == 1:
        yield Crew(worker, [])
        return
    content = pickle.dumps(worker)
    with ExitStack() as stack:
        members = [stack.enter_context(closing(Member(content))) for _ in range(processes)]
        threads = stack.enter_context(ThreadPoolExecutor(processes, thread_name_prefix="tokenizes"))
        # In turn: nothing new is begun, who is asked ends, and so does each thread that waits for an answer.
        for member in members:
            stack.callback(member.end)
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        yield Crew(worker, members, threads)


def _serve(connection: Connection) -> None:
    """Batch by batch, until the parent ends us or is no more: then a connection that only it has is at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # transformers imports torch where it finds it: two seconds and hundreds of megabytes that no tokenizer needs.
    sys.modules.setdefault("torch", cast("object", None))  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    # One thread a process: they are as many as there are processors.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        worker: Worker = pickle.loads(connection.recv_bytes())
        # What is there stays, and samples are freed without the collector: it need not look at them so often.
        gc.freeze()
        gc.set_threshold(100_000)
        while True:
            connection.send(_answer(worker, connection.recv()))
    except (EOFError, OSError):
        return


def _answer(worker: Worker, batch: Batch) -> Done | Exception:
    try:
        return worker(batch)
    except Exception as error:  # noqa: BLE001 - it is raised where the batch is waited for
        error.add_note(traceback.format_exc())
        return error
