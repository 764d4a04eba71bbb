"""One worker: starts its ranks through torchrun's own agent, serves their progress, and reports how they ended
(`conclusion.py`)."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from pydantic import ValidationError

from tuneward_api import names
from tuneward_api.conditions import Reason
from tuneward_api.files import Plan, Result
from tuneward_api.names import ExitCode
from tuneward_trainer import nccl, rundir
from tuneward_trainer.conclusion import Outcome, conclude, draw_losses, failed, keep_logs, last_words
from tuneward_trainer.machine import processors
from tuneward_trainer.progress import ENV_HTTP_PORT, ENV_STATUS_DIR, serve
from tuneward_trainer.report import start_logging
from tuneward_trainer.standing import watched
from tuneward_trainer.tracking import tracked

SAVE_SECONDS: Final = names.GRACE_PERIOD_SECONDS - 15
"""What ranks get to save after SIGTERM; the rest of the grace period is for the report."""
RENDEZVOUS_SECONDS: Final = 24 * 3600
"""The operator bounds how long a gang may take to gather (runPolicy.startTimeoutSeconds), so this does not."""

BEFORE_TORCH: Final = {
    # libgomp's threads spin for a millisecond at each barrier: where processors are shared (a quota, other pods) a step then
    # takes twice as long.
    "GOMP_SPINCOUNT": "5000",
    # A layer's tensors are of some megabytes: on huge pages a processor finds them faster.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""What the environment must say before torch is loaded, where it says nothing else."""

logger = logging.getLogger("tuneward_trainer.launch")


@dataclass(frozen=True)
class Shape:
    """How many processes make the gang, and which of them this worker starts."""

    workers: int
    index: int
    ranks_here: int
    gpus: bool = False
    """Each rank here has one."""


def main(plan_path: Path) -> int:
    """Trains what the plan says and returns the exit code of the contract."""
    for name, value in BEFORE_TORCH.items():
        os.environ.setdefault(name, value)
    start_logging()
    try:
        plan = rundir.load_plan(plan_path)
    except (OSError, ValidationError) as error:
        logger.error("the plan %s cannot be read: %s", plan_path, error)
        return ExitCode.INPUT_MISSING if isinstance(error, OSError) else ExitCode.CONFIG_BAD
    run = rundir.directory(names.ENV_RUN_DIR)
    known = rundir.terminal_result(run, plan.digest())
    if known is not None:
        logger.info("attempt %d ended this plan already: %s", known.attempt, known.message)
        return report(known)
    shape, seconds = shape_of(plan), nccl.hang_seconds(plan)
    with (
        status_folder() as folder,
        served(folder),
        watched(folder, shape.ranks_here, seconds, partial(leave_hung, plan, folder))
        if shape.workers == 1
        else nullcontext(),
        tracked(plan, plan_path, folder, run) as tracking,
    ):
        before = memory_kills()
        outcome = launch(plan_path, folder, shape, hang_seconds=seconds)
        result = conclude(plan, run, folder, outcome, out_of_memory=memory_kills() > before)
        keep_logs(run, folder, result.attempt)
        draw_losses(run, plan)
        result = result.model_copy(update={"trackers": tracking.end()})
    return report(result)


def leave_hung(plan: Plan, folder: Path, sentence: str) -> NoReturn:
    """Without a word to the run directory, whose volume does not answer."""
    report(failed(plan, folder, Reason.HANG, sentence, ExitCode.TRY_AGAIN))
    os._exit(ExitCode.TRY_AGAIN)


def report(result: Result) -> int:
    rundir.report(result)
    logger.info("%s (exit code %d)", result.message, result.exit_code)
    return int(result.exit_code)


# -- before ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def status_folder() -> Iterator[Path]:
    """Where ranks leave their progress: TUNEWARD_STATUS_DIR, or a temporary folder."""
    named = os.environ.get(ENV_STATUS_DIR)
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        for leftover in Path(named).glob("*.json"):
            leftover.unlink()
        yield Path(named)
        return
    with tempfile.TemporaryDirectory(prefix="tuneward-") as folder:
        os.environ[ENV_STATUS_DIR] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(ENV_STATUS_DIR, None)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[None]:
    """/progress and the rest on POD_IP. On a workstation another job may have the port: then any free one, said."""
    host = os.environ.get(names.ENV_POD_IP) or "127.0.0.1"
    port = int(os.environ.get(ENV_HTTP_PORT) or names.TRAINER_PORT)
    server = _server(folder, host, port)
    logger.info("progress at http://%s:%d/progress", host, server.server_address[1])
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    try:
        return serve(folder, host, port)
    except OSError as error:
        logger.warning("port %d of %s is not free (%s): taking another", port, host, error)
        return serve(folder, host, 0)


def shape_of(plan: Plan) -> Shape:
    """In a pod one worker of `replicas`, a rank for each of its GPUs. On a workstation (no JOB_COMPLETION_INDEX) one
    worker that plays all of them, with no more ranks than the machine has GPUs or processors."""
    import torch

    asked = plan.request.spec.workers
    replicas = (asked.replicas if asked is not None else None) or 1
    gpus_asked = asked.gpus_per_worker if asked is not None else None
    gpus = 0 if gpus_asked == 0 else torch.cuda.device_count()
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is not None:
        return Shape(replicas, int(index), max(1, min(gpus, gpus_asked or gpus)), gpus > 0)
    wanted = replicas * max(1, 1 if gpus_asked is None else gpus_asked)
    return Shape(1, 0, max(1, min(wanted, gpus or processors())), gpus > 0)


def memory_kills() -> int:
    """Processes of this container that the kernel killed for memory so far."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            key, value = line.split()
            if key == "oom_kill":
                return int(value)
    return 0


# -- the agent -------------------------------------------------------------------------------------------------------


def launch(plan_path: Path, folder: Path, shape: Shape, *, hang_seconds: int | None) -> Outcome:
    """Runs the ranks to their end."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # How ranks end is said here, in the words of the contract.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT") or free_port())
    prepare_environment(shape, nccl.environment(hang_seconds, folder) if shape.gpus else {})
    program, *arguments = program_of(plan_path, shape)
    config = LaunchConfig(
        min_nodes=shape.workers,
        max_nodes=shape.workers,
        nproc_per_node=shape.ranks_here,
        run_id="tuneward",
        role="rank",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": shape.index, "timeout": RENDEZVOUS_SECONDS},
        local_addr=os.environ.get(names.ENV_POD_IP) or None,
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL, tee=Std.ALL),
        log_line_prefix_template="[rank ${rank}] ",
        signals_to_handle="SIGTERM,SIGINT",
        shutdown_timeout=SAVE_SECONDS,
    )
    watch = StopWhileGathering()
    try:
        elastic_launch(config, program)(*arguments)
    except ChildFailedError as error:
        return Outcome(
            {rank: failure.exitcode for rank, failure in error.failures.items()},
            said={rank: last_words(folder, failure.local_rank) for rank, failure in error.failures.items()},
        )
    except SignalException:
        return Outcome({}, stopped=True)
    except (RuntimeError, OSError) as error:
        return Outcome({}, error=f"the gang could not gather at {address}:{port}: {error}")
    finally:
        watch.end()
    return Outcome({})


def program_of(plan_path: Path, shape: Shape) -> tuple[Callable[[str], None] | str, *tuple[str, ...]]:
    """What each rank runs, and its arguments.

    Without a GPU it is forked from this process, which then loads torch and the models' libraries for all of them: a
    program of its own takes longer to load than a small job takes to train. CUDA does not outlive a fork.
    """
    if shape.gpus:
        return sys.executable, "-m", "tuneward_trainer.train", str(plan_path)
    import tuneward_trainer.train  # noqa: F401 - for the ranks

    return forked_rank, str(plan_path)


def forked_rank(plan_path: str) -> None:
    """In the child. Returns where all is well, as torchrun's agent expects; else the process ends with the exit code."""
    from tuneward_trainer import train

    # What the launcher does on a signal is not for its ranks.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    close_sockets()
    # What is loaded stays, in pages that all ranks share while nobody looks at it; what a step leaves behind does not.
    gc.freeze()
    gc.set_threshold(700, 10, 10)
    code = train.run(Path(plan_path))
    if code:
        os._exit(code)


def close_sockets() -> None:
    """A rank that outlives its launcher by a moment must not hold its ports. Their numbers stay taken, so that whoever
    still knows one closes nothing of ours."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                os.dup2(nothing, int(file.name))
    os.close(nothing)


def prepare_environment(shape: Shape, wanted: Mapping[str, str]) -> None:
    """For the ranks, which inherit it; `wanted` where it says nothing else."""
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors() // shape.ranks_here)))
    # Ranks log through a pipe, and a line must be seen when it is said.
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if shape.workers == 1:
        # A machine's own name may lead nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


class StopWhileGathering:
    """Ends the process on SIGTERM while it waits for the other workers.

    That wait is in C++ and lets no Python handler run (and process 1 of a container ignores a signal without one), so a
    thread reads the signal from a pipe. Once ranks run, the agent's own handler stops them and this does nothing.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._main = threading.main_thread().ident or 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_stopped)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def _watch(self) -> None:
        stopping = {int(signal.SIGTERM), int(signal.SIGINT)}
        while data := os.read(self._read, 64):
            if stopping & set(data) and self._gathering():
                logger.info("stopped on request before the gang was complete (exit code %d)", ExitCode.STOPPED)
                os._exit(ExitCode.STOPPED)

    def _gathering(self) -> bool:
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name == "next_rendezvous":
                return True
            frame = frame.f_back
        return False

    def end(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    raise SignalException(f"process {os.getpid()} got signal {number} in {frame}", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
