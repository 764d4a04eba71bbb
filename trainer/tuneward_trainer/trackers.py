"""One tracker of a training, as a process of its own: it follows metrics.jsonl and hands every step on, once.

    python -m tuneward_trainer.trackers NAME PLAN STATUS_DIR RUN_DIR

The launcher's worker 0 starts one for each that `spec.trackers` names (`tracking.py`) and ends it by closing its stdin. So
a tracker's imports, threads, network and crashes are outside of the training. What it comes to is one small file in the
status folder. An attempt continues the run of the one before: whatever the tracker has already is not sent again, and what
it has missed of earlier attempts is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tuneward_api.files import Plan
from tuneward_api.trackers import PROJECT, SECRET_KEYS, MLflow, TrackerName, TrackerState, Trackio, WandB
from tuneward_trainer.metrics import FILE, Line, history, parse, tags
from tuneward_trainer.rundir import attempt_directory, attempt_numbers

SEND_SECONDS: Final = 2.0
"""Between two looks for new lines."""
RETRY_SECONDS: Final = (5.0, 600.0)
"""First and longest wait after a tracker could not be reached."""
LAST_SECONDS: Final = 10.0
"""What it gets once stdin is closed, should the launcher be gone and not end it."""

Steps = list[tuple[int, dict[str, float]]]


class UnusableError(Exception):
    """Trying again would not help. The text says what to do."""


@dataclass(frozen=True)
class Run:
    """What a tracker calls this training. `key` is the same for all attempts, and another for another run directory."""

    key: str
    name: str
    config: dict[str, Any]
    folder: Path
    """Where a tracker may keep files."""
    in_cluster: bool


class Tracker(Protocol):
    url: str

    def send(self, steps: Steps) -> None:
        """Hands over what it does not have yet. May be called again with the same steps after it has raised."""

    def finish(self) -> None: ...


# -- the libraries -----------------------------------------------------------------------------------------------------


class WandBTracker:
    def __init__(self, run: Run, asked: WandB) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True)
        if asked.base_url:
            settings.base_url = asked.base_url
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                id=run.key,
                resume="allow",
                name=run.name,
                project=asked.project or PROJECT,
                entity=asked.entity,
                group=asked.group,
                config=run.config,
                dir=str(run.folder),
                settings=settings,
            )
        except wandb.errors.UsageError as error:
            if "api key" in str(error).lower() or "api_key" in str(error).lower():
                raise UnusableError(no_key("wandb")) from error
            raise
        self.url = self._run.url or ""
        # Of a run that is resumed the one after its last; an earlier one would be dropped with a warning.
        self._next = int(self._run.step)

    def send(self, steps: Steps) -> None:
        for step, values in steps:
            if step >= self._next:
                # A row is finished when a later step comes, so a validation finds its step's.
                self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class MLflowTracker:
    def __init__(self, run: Run, asked: MLflow) -> None:
        for variable, value in {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_PYTHON_REFRESH": "quiet",
        }.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=asked.tracking_uri)
        name = asked.experiment or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        found = self._client.search_runs([where], f"tags.`tuneward.run` = '{run.key}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(where, run_name=run.name, tags={"tuneward.run": run.key}).info.run_id
            for key, value in run.config.items():
                self._client.log_param(self._id, key, str(value)[:500])
        self.url = (
            f"{asked.tracking_uri.rstrip('/')}/#/experiments/{where}/runs/{self._id}"
            if asked.tracking_uri.startswith("http")
            else asked.tracking_uri
        )
        self._last = {
            tag: max(metric.step for metric in self._client.get_metric_history(self._id, tag))
            for tag in (found[0].data.metrics if found else {})
        }

    def send(self, steps: Steps) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # One request takes a thousand figures.
        for first in range(0, len(steps), 50):
            part = [
                Metric(tag, value, now, step)
                for step, values in steps[first : first + 50]
                for tag, value in values.items()
                if step > self._last.get(tag, -1)
            ]
            self._client.log_batch(self._id, metrics=part)
            self._last |= {metric.key: metric.step for metric in part}

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class TrackioTracker:
    def __init__(self, run: Run, asked: Trackio) -> None:
        if run.in_cluster:
            # Read when it is imported; the home folder of a pod goes with it.
            os.environ.setdefault("TRACKIO_DIR", str(run.folder))
        import trackio

        # It cannot be asked what it has, of a Space least of all.
        self._mark = run.folder / f"{run.key}.json"
        self._next = _read_mark(self._mark)
        self._trackio = trackio
        project = asked.project or PROJECT
        try:
            trackio.init(
                project=project,
                name=f"{run.name}-{run.key}",
                space_id=asked.space,
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except Exception as error:
            if "TokenNotFound" in type(error).__name__:
                raise UnusableError(no_key("trackio")) from error
            raise
        self.url = f"https://huggingface.co/spaces/{asked.space}" if asked.space else f"trackio show --project {project}"

    def send(self, steps: Steps) -> None:
        for step, values in steps:
            if step >= self._next:
                self._trackio.log(values, step=step)
        if steps:
            # A step's validation may still come; the next attempt begins behind the last step.
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.write_text(json.dumps(max(self._next, steps[-1][0] + 1)))

    def finish(self) -> None:
        self._trackio.finish()


def _read_mark(file: Path) -> int:
    try:
        return int(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return 0


def no_key(name: TrackerName) -> str:
    keys, variables = SECRET_KEYS[name], ", ".join(SECRET_KEYS[name].values())
    return (
        f"no key: spec.trackers.{name}.secretRef must name a Secret with {', '.join(keys)}; on a workstation set {variables}"
    )


def opened(name: TrackerName, plan: Plan, run: Run) -> Tracker:
    """Raises UnusableError, and whatever a library raises when its server does not answer."""
    asked = plan.request.spec.trackers
    try:
        match asked.asked()[name] if asked is not None else None:
            case WandB() as wandb:
                return WandBTracker(run, wandb)
            case MLflow() as mlflow:
                return MLflowTracker(run, mlflow)
            case Trackio() as trackio:
                return TrackioTracker(run, trackio)
    except ModuleNotFoundError as error:
        raise UnusableError(
            f"{error.name} is not installed: run pip install 'tuneward[{name}]' on a workstation, or for the image that the "
            "chart's images.trainer names"
        ) from error
    raise UnusableError(f"spec.trackers names no {name}")


# -- following -----------------------------------------------------------------------------------------------------------


@dataclass
class Follower:
    """Lines of a file that grows, each once; the last is read when it is whole."""

    file: Path
    _read: int = 0

    def lines(self) -> Iterator[Line]:
        try:
            with self.file.open("rb") as stream:
                stream.seek(self._read)
                text = stream.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        yield from parse(whole.decode(errors="replace"))


@dataclass
class Voice:
    """What the launcher, and through it `status`, knows of this tracker. Never a key."""

    file: Path
    name: str
    said: Callable[[str], None]
    url: str = ""
    message: str = ""

    def tell(self, message: str = "") -> None:
        message = self._clean(message)
        if message and message != self.message:
            self.said(f"{self.name}: {message}")
        self.message = message
        state = TrackerState(name=self.name, url=self._clean(self.url), message=message).to_json()
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({**state, "at": time.time()}))
        temporary.replace(self.file)

    def _clean(self, text: str) -> str:
        known = [os.environ.get(variable, "") for keys in SECRET_KEYS.values() for variable in keys.values()]
        for secret in (value for value in known if len(value) > 3):
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]


def follow(run: Path, number: int, voice: Voice, ending: threading.Event, open_: Callable[[], Tracker]) -> None:
    """Until `ending`, and then once more. Raises UnusableError."""
    lines = history(run, number)
    follower = Follower(attempt_directory(run, number) / FILE)
    tracker: Tracker | None = None
    wait = RETRY_SECONDS[0]
    while True:
        last = ending.is_set()
        lines += follower.lines()
        try:
            if tracker is None:
                tracker = open_()
                voice.url = tracker.url
            tracker.send([(line["step"], tags(line)) for line in lines])
            lines = []
            if last:
                tracker.finish()
            voice.tell()
            wait = RETRY_SECONDS[0]
        except UnusableError:
            raise
        except Exception as error:  # noqa: BLE001 - a library's; its server may come back
            voice.tell(f"not reached, tried again: {type(error).__name__}: {error}")
            pause, wait = wait, min(2 * wait, RETRY_SECONDS[1])
        else:
            pause = SEND_SECONDS
        if last:
            return
        ending.wait(pause)


def run_of(plan: Plan, run: Path, name: TrackerName) -> Run:
    """A job has a uid; on a workstation the first attempt tells one run directory from the next (`--restart`)."""
    job, prepared = plan.request.job, plan.prepared
    identity = job.uid
    if not identity:
        first = min(attempt_numbers(run), default=0)
        identity = plan.digest() + (attempt_directory(run, first) / "start.json").read_text()
    config = {
        "job": f"{job.namespace}/{job.name}",
        "base": prepared.base.uri,
        "data": prepared.data.summary.digest,
        "objective": prepared.objective.type,
        **{f"method.{key}": value for key, value in prepared.method.to_json().items()},
        **{f"hyperparameters.{key}": value for key, value in prepared.hyperparameters.to_json().items()},
    }
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Run(key, job.name, config, run / "trackers" / name, bool(job.uid))


def attempt_of(status: Path, ending: threading.Event) -> int:
    """Its number, as soon as the first rank has told it; 0 when the end comes first."""
    while True:
        last = ending.is_set()
        try:
            number = int(json.loads((status / "rank-0.json").read_bytes()).get("attempt", 0))
        except (OSError, ValueError):
            number = 0
        if number or last:
            return number
        ending.wait(0.5)


def main(name: TrackerName, plan_path: Path, status: Path, run: Path) -> int:
    # What libraries print goes nowhere: it may hold what must not be told.
    output = os.fdopen(os.dup(2), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    ending = threading.Event()
    threading.Thread(target=_await_end, args=(ending,), daemon=True).start()
    voice = Voice(status / f"tracker-{name}.json", name, lambda line: print(line, file=output))
    plan = Plan.model_validate_json(plan_path.read_bytes())
    number = attempt_of(status, ending)
    if not number:
        return 0
    try:
        follow(run, number, voice, ending, lambda: opened(name, plan, run_of(plan, run, name)))
    except UnusableError as error:
        voice.tell(str(error))
    except Exception as error:  # noqa: BLE001 - the last handler of a process
        voice.tell(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _await_end(ending: threading.Event) -> None:
    sys.stdin.buffer.read()
    ending.set()
    time.sleep(LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    # Threads that a library leaves behind do not hold it.
    os._exit(main(sys.argv[1], *(Path(argument) for argument in sys.argv[2:5])))  # type: ignore[arg-type]
