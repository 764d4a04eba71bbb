"""How far the training is: ranks leave a small file, their worker's launcher serves it over HTTP.

/progress  files.Progress as JSON: what the operator and `tuneward train` show
/metrics   the same for Prometheus
/stacks    every thread of every rank of this worker, to see where one hangs
/healthz   whether this worker's launcher lives

A rank writes its file at each step and never waits for anybody, so a reader that hangs cannot hold up the training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from tuneward_api import names
from tuneward_api.files import Progress
from tuneward_trainer.rundir import now
from tuneward_trainer.tracking import states

ENV_STATUS_DIR: Final = "TUNEWARD_STATUS_DIR"
ENV_HTTP_PORT: Final = "TUNEWARD_HTTP_PORT"

METRICS: Final = {
    "tuneward_attempt": ("Number of this attempt.", "attempt"),
    "tuneward_step": ("Optimizer steps done.", "step"),
    "tuneward_steps": ("Optimizer steps of the whole job.", "steps"),
    "tuneward_train_loss": ("Training loss of the last step, nats a target token, of DPO a pair.", "trainLoss"),
    "tuneward_validation_loss": ("Last validation loss, nats a target token, of DPO a pair.", "validationLoss"),
    "tuneward_reward_margin": ("DPO: how much more chosen than rejected answers gained, last step.", "rewardMargin"),
    "tuneward_reward_accuracy": ("DPO: share of the last step's pairs with a margin above 0.", "rewardAccuracy"),
    "tuneward_learning_rate": ("Learning rate of the last step.", "learningRate"),
    "tuneward_tokens_per_second": ("Tokens a second over all ranks.", "tokensPerSecond"),
    "tuneward_eta_seconds": ("Estimated seconds to the last step.", "etaSeconds"),
    "tuneward_memory_bytes": ("Largest memory of the first rank so far: of its GPU, or resident in a CPU's.", "memoryBytes"),
    "tuneward_mfu": ("Model FLOPs utilization: share of the GPUs' dense bf16 peak that is needed.", "mfu"),
    "tuneward_checkpoint_step": ("Step of the newest complete checkpoint.", "checkpointStep"),
}
"""Name -> (meaning, field of the progress)."""


# -- the rank's side -------------------------------------------------------------------------------------------------


class Reporter:
    """Keeps this rank's Progress and writes it to <status dir>/rank-<rank>.json."""

    def __init__(self, folder: Path | None, rank: int, **known: Any) -> None:
        self._file = None if folder is None else folder / f"rank-{rank}.json"
        self._known: dict[str, Any] = {
            "pod_uid": os.environ.get(names.ENV_POD_UID, ""),
            "node": os.environ.get(names.ENV_NODE_NAME, ""),
            **known,
        }

    def update(self, **fields: Any) -> None:
        """Fields of Progress by their Python names; None and numbers that are not finite take a field out."""
        self._known |= fields
        self._known = {name: value for name, value in self._known.items() if _is_finite(value)}
        if self._file is None:
            return
        body = Progress(**self._known, observed_at=now()).to_json() | {"pid": os.getpid()}
        temporary = self._file.with_suffix(".tmp")
        # A full disk is no reason to stop training, and the next word says as much as this one.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(body))
            temporary.replace(self._file)

    @property
    def progress(self) -> Progress:
        return Progress(**self._known)


def _is_finite(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value - value != 0)


def dump_stacks_on_signal(folder: Path | None, rank: int) -> None:
    """SIGUSR1 writes the stacks of all threads, also while the interpreter is busy in C."""
    if folder is not None:
        # Open as long as the process lives: the handler writes to its descriptor.
        stacks = (folder / f"rank-{rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)


class Clock:
    """Tokens a second and seconds left, from the last steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._mark = time.monotonic()

    def tick(self, step: int, tokens: int) -> dict[str, Any]:
        """Call when `step` steps are done, the last one with `tokens` tokens."""
        seconds, self._mark = time.monotonic() - self._mark, time.monotonic()
        self._recent.append((seconds, tokens))
        spent = sum(part for part, _ in self._recent)
        return {
            "step_seconds": seconds,
            "tokens_per_second": sum(count for _, count in self._recent) / max(spent, 1e-9),
            "eta_seconds": round((self._steps - step) * spent / len(self._recent)),
        }

    def reset(self) -> None:
        """Leaves out what was not a step: an evaluation, a save."""
        self._mark = time.monotonic()


# -- the launcher's side ---------------------------------------------------------------------------------------------


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of this worker last wrote, by rank. Ranks that wrote nothing yet are absent."""
    found = []
    for file in sorted(folder.glob("rank-*.json"), key=lambda path: int(path.stem.removeprefix("rank-"))):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text()))
    return found


def progress_of(folder: Path) -> Progress:
    """The first rank's progress (the leader's on worker 0), with the step of each rank of this worker."""
    ranks, trackers = read_ranks(folder), states(folder)
    if not ranks:
        return Progress(observed_at="", pod_uid=os.environ.get(names.ENV_POD_UID, ""), trackers=trackers)
    found = Progress.model_validate({**ranks[0], "rankSteps": [rank.get("step", 0) for rank in ranks]})
    return found.model_copy(update={"trackers": trackers})


class _Collector:
    """Gauges made of the progress at each scrape."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        ranks = read_ranks(self._folder)
        values = progress_of(self._folder).to_json()
        values["checkpointStep"] = values.get("checkpoint", {}).get("step")
        for name, (meaning, field) in METRICS.items():
            if values.get(field) is not None:
                gauge = GaugeMetricFamily(name, meaning)
                gauge.add_metric([], float(values[field]))
                yield gauge
        yield _rank_steps(ranks)


def _rank_steps(ranks: list[dict[str, Any]]) -> Metric:
    gauge = GaugeMetricFamily("tuneward_rank_step", "Optimizer steps done by a rank of this worker.", labels=["rank"])
    for index, rank in enumerate(ranks):
        gauge.add_metric([str(index)], float(rank.get("step", 0)))
    return gauge


def stacks(folder: Path, *, seconds: float = 3.0) -> str:
    """Asks each rank for its stacks and waits shortly for the answer."""
    texts = []
    for rank in read_ranks(folder):
        file = next((path for path in folder.glob("rank-*.json") if _pid_of(path) == rank["pid"]), None)
        if file is not None:
            texts.append(
                f"== {file.stem} (pid {rank['pid']})\n{_stacks_of(rank['pid'], file.with_suffix('.stacks'), seconds)}"
            )
    return "\n".join(texts) or "no rank has started yet\n"


def _pid_of(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        pid: int | None = json.loads(file.read_text()).get("pid")
        return pid
    return None


def _stacks_of(pid: int, file: Path, seconds: float) -> str:
    try:
        before = file.stat().st_size
        os.kill(pid, signal.SIGUSR1)
    except OSError as error:
        return f"no stacks: {error}\n"
    deadline = time.monotonic() + seconds
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.02)
        # Complete once it has grown and grows no more.
        previous, size = size, file.stat().st_size
        if size == previous > before:
            break
    with file.open("rb") as stream:
        stream.seek(before)
        return stream.read().decode(errors="replace")


def serve(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Starts to serve in a daemon thread. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(_Collector(folder))
    routes: dict[str, Callable[[], tuple[str, bytes]]] = {
        "/progress": lambda: ("application/json", _progress_body(folder)),
        "/metrics": lambda: ("text/plain; version=0.0.4; charset=utf-8", generate_latest(registry)),
        "/stacks": lambda: ("text/plain; charset=utf-8", stacks(folder).encode()),
        "/healthz": lambda: ("text/plain; charset=utf-8", b"ok\n"),
    }
    server = ThreadingHTTPServer((host, port), _handler(routes))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _progress_body(folder: Path) -> bytes:
    return json.dumps(progress_of(folder).to_json()).encode() + b"\n"


def _handler(routes: dict[str, Callable[[], tuple[str, bytes]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            route = routes.get(self.path.split("?")[0])
            kind, body = route() if route is not None else ("text/plain", b"not found\n")
            self.send_response(200 if route is not None else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Scrapes are no news."""

    return Handler
