"""Batches through as many processes as the machine has processors, and back in their order.

A tokenizer spreads a batch over all processors by itself, but reading, rendering and masks are Python's, one at a time. So
where there is much to do every process has a worker of its own, which sends back arrays. What is on its way at any time is
bounded: memory does not grow with the files.

Each process has a thread here that asks it and a connection that nobody else has. No lock is shared, so one that is killed
or stands still keeps nothing waiting but its thread, and can be replaced: processes were seen that never began, and there
concurrent.futures' pool, which this was, waits for ever.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
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

log = logging.getLogger(__name__)

WORTH: Final = 64 << 20
"""Bytes of files from which on the seconds are won back that it takes to start processes."""
_AHEAD: Final = 3
"""Batches of each process that are read and not yet written."""
_PATIENCE: Final = 240.0
"""Seconds for one batch, whose work is a second's, and for a process to start, perhaps from a store far away."""
_KILLED: Final = "a process that tokenizes was killed, perhaps for memory; give it more, or have less run beside it"
Pending: TypeAlias = "deque[tuple[Batch, Future[Done]]]"


class _StillError(Exception):
    """Nothing came for too long."""


class Member:
    """One process with a worker; where it stands still, another in its place."""

    def __init__(self, worker: bytes) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._ended = False
        self._begin()

    @property
    def id(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, batch: Batch) -> Done:
        """What became of it. Raises ChildProcessError where the process was killed, or two stood still, and what its worker
        raises."""
        try:
            try:
                answer = self._asked(batch)
            except _StillError:
                log.warning("a process that tokenizes stood still for %.0f s; another one goes on", _PATIENCE)
                self._again()
                answer = self._asked(batch)
        except (EOFError, OSError) as error:
            raise ChildProcessError(_KILLED) from error
        except _StillError as error:
            lines = f"lines {batch.records[0][0]} to {batch.records[-1][0]}"
            seen = f"two processes that tokenize made nothing of {lines} in {_PATIENCE:.0f} s each"
            raise ChildProcessError(f"{seen}; try again with less beside it, or without these lines") from error
        if isinstance(answer, BaseException):
            raise answer
        return cast("Done", answer)

    def end(self) -> None:
        """It holds nothing that is not sent: it need not be asked."""
        with self._lock:
            self._ended = True
            self._kill()

    def close(self) -> None:
        """When nobody asks any more."""
        self._connection.close()

    def _begin(self) -> None:
        # Not forked: this process may hold threads of torch, and locks of theirs.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with theirs:  # closed here, so that its end is seen
            self._process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        self._is_new = True

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _again(self) -> None:
        with self._lock:
            if not self._ended:
                self._kill()
                self._connection.close()
                self._begin()

    def _asked(self, batch: Batch) -> object:
        if self._is_new:
            self._receive()  # it has set itself up, and reads whatever is sent
            self._connection.send_bytes(self._worker)
            self._is_new = False
        self._connection.send(batch)
        return self._receive()

    def _receive(self) -> object:
        if not self._connection.poll(_PATIENCE):
            raise _StillError
        return self._connection.recv()


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
    return batch, future.result()


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
        connection.send(None)
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
