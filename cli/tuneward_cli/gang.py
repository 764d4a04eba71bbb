"""One attempt on one machine: the workers that would be pods, as processes.

Each worker has a loopback address of its own, as a pod has: the trainer's fixed port is then free for every worker and
for two jobs at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.failures import Failure, classify
from tuneward_api.files import Result
from tuneward_cli.process import environment
from tuneward_cli.words import Seen

_POLL: Final = 0.5


@dataclass
class Worker:
    """A process of the gang, with where its last words go."""

    process: subprocess.Popen[bytes]
    address: str
    last_words: Path

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def result(self) -> Result | None:
        """What it reported at its end."""
        try:
            return Result.model_validate_json(self.last_words.read_bytes())
        except (OSError, ValidationError):
            return None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Gang:
    """All workers of one attempt. Everything it starts is ended by `close`."""

    workers: list[Worker] = field(default_factory=list)

    @classmethod
    def start(cls, count: int, *, plan: Path, run: Path, extra: Mapping[str, str]) -> Gang:
        gang = cls()
        base = _addresses(run)
        port = 20000 + int(hashlib.sha256(str(run).encode()).hexdigest(), 16) % 10000
        for index in range(count):
            gang.workers.append(_worker(index, count, f"{base}.{index + 1}", f"{base}.1", port, plan, run, extra))
        return gang

    def stop(self) -> None:
        """Asks all of them to save a checkpoint and end."""
        for worker in self.workers:
            worker.send(signal.SIGTERM)

    def close(self, grace: float = float(names.GRACE_PERIOD_SECONDS)) -> None:
        """Asks, waits, kills."""
        self.stop()
        deadline = time.monotonic() + grace
        while any(worker.code is None for worker in self.workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in self.workers:
            worker.send(signal.SIGKILL)
            worker.process.wait()

    def progress(self) -> Seen | None:
        """The leader's; None while it does not answer."""
        try:
            answer = httpx.get(f"http://{self.workers[0].address}:{names.TRAINER_PORT}/progress", timeout=2, trust_env=False)
            return Seen.of(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError):
            return None

    def watch(self, seen: Callable[[Seen], None]) -> tuple[int, Result | None]:
        """Until all have ended, or one has failed: exit code and report of whoever ended the attempt."""
        while True:
            ended = [worker for worker in self.workers if worker.code is not None]
            failed = [worker for worker in ended if worker.code]
            if failed:
                return _verdict(failed[0])
            if len(ended) == len(self.workers):
                return _verdict(self.workers[0])
            if (progress := self.progress()) is not None:
                seen(progress)
            time.sleep(_POLL)


def failure_of(code: int, result: Result | None) -> Failure:
    """In the words of status."""
    if result is None:
        return classify(exit_code=code)
    return classify(exit_code=code, reason=str(result.reason), message=result.message)


def _verdict(worker: Worker) -> tuple[int, Result | None]:
    code = worker.code
    assert code is not None
    return code, worker.result()


def _addresses(run: Path) -> str:
    """`127.a.b`, the same for the same run directory; 127.0.0 where the machine has one loopback address only."""
    digest = hashlib.sha256(str(run).encode()).digest()
    base = f"127.{65 + digest[0] % 128}.{digest[1]}"
    with socket.socket() as probe:
        try:
            probe.bind((f"{base}.1", 0))
        except OSError:
            return "127.0.0"
    return base


def _worker(
    index: int, count: int, address: str, leader: str, port: int, plan: Path, run: Path, extra: Mapping[str, str]
) -> Worker:
    folder = run / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    last_words = folder / f"worker-{index}.termination"
    last_words.unlink(missing_ok=True)
    own = {
        names.ENV_POD_NAME: f"worker-{index}",
        names.ENV_POD_UID: str(uuid.uuid4()),
        names.ENV_POD_IP: address,
        names.ENV_NODE_NAME: socket.gethostname(),
        names.ENV_TERMINATION_LOG: str(last_words),
        "JOB_COMPLETION_INDEX": str(index),
        "MASTER_ADDR": leader,
        "MASTER_PORT": str(port),
        "TUNEWARD_WORKERS": str(count),
    }
    with (folder / f"worker-{index}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneward_trainer", "train", "--plan", str(plan)],
            env=environment({**extra, **own}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Worker(process=process, address=address, last_words=last_words)
