"""One attempt on one machine: the trainer's launcher as a process, with as many ranks as the plan and the machine allow.

It has a loopback address of its own, as a pod has: the trainer's fixed port is then free for two jobs at once.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.failures import Failure, classify
from tuneward_api.files import Progress, Result
from tuneward_cli.process import environment
from tuneward_cli.words import Seen

_POLL: Final = 0.5


class HangError(Exception):
    """No step for too long, though the launcher answers."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass
class Gang:
    """A running attempt. `close` ends everything that it started."""

    process: subprocess.Popen[bytes]
    address: str
    last_words: Path
    client: httpx.Client

    @classmethod
    def start(cls, *, plan: Path, run: Path, extra: Mapping[str, str]) -> Gang:
        folder = run / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        last_words, address = folder / "worker-0.termination", _address(run)
        last_words.unlink(missing_ok=True)
        # No JOB_COMPLETION_INDEX: the launcher then plays all workers of the plan.
        own = {
            names.ENV_POD_NAME: "worker-0",
            names.ENV_POD_UID: str(uuid.uuid4()),
            names.ENV_POD_IP: address,
            names.ENV_NODE_NAME: socket.gethostname(),
            names.ENV_TERMINATION_LOG: str(last_words),
        }
        with (folder / "worker-0.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tuneward_trainer", "train", "--plan", str(plan)],
                env=environment({**extra, **own}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = httpx.Client(base_url=f"http://{address}:{names.TRAINER_PORT}", timeout=2, trust_env=False)
        return cls(process=process, address=address, last_words=last_words, client=client)

    def close(self, grace: float = float(names.GRACE_PERIOD_SECONDS)) -> None:
        """Asks it to save a checkpoint and end, waits, kills what is left."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=grace)
        finally:
            # Also where a person waits no longer. Ranks of a launcher that was killed are still in its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.client.close()

    def progress(self) -> Progress | None:
        """None while it does not answer."""
        try:
            answer = self.client.get("/progress")
            return Progress.model_validate_json(answer.raise_for_status().content)
        except (httpx.HTTPError, ValueError):
            return None

    def watch(self, seen: Callable[[Seen | None], None], *, hang_seconds: int) -> tuple[int, Result | None]:
        """Until it has ended: exit code and what it reported. Raises HangError."""
        last, since = Progress(), time.monotonic()
        while (code := self.process.poll()) is None:
            found = self.progress()
            seen(Seen.of(found.to_json()) if found is not None else None)
            if found is None or found.phase != "Training" or found.step != last.step:
                last, since = found or last, time.monotonic()
            elif time.monotonic() - since >= hang_seconds:
                raise HangError(found.step)
            time.sleep(_POLL)
        return code, self.result()

    def result(self) -> Result | None:
        try:
            return Result.model_validate_json(self.last_words.read_bytes())
        except (OSError, ValidationError):
            return None


def failure_of(code: int, result: Result | None) -> Failure:
    """In the words of status."""
    if result is None:
        return classify(exit_code=code)
    return classify(exit_code=code, reason=str(result.reason), message=result.message)


def _address(run: Path) -> str:
    """`127.a.b.1`, the same for the same run directory; 127.0.0.1 where the machine has one loopback address only."""
    digest = hashlib.sha256(str(run).encode()).digest()
    own = f"127.{65 + digest[0] % 128}.{digest[1]}.1"
    with socket.socket() as probe:
        try:
            probe.bind((own, 0))
        except OSError:
            return "127.0.0.1"
    return own
