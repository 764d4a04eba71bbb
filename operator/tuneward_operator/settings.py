"""What an administrator chooses: each field is a flag of `python -m tuneward_operator run` and an environment variable.

`image_trainer` is `--image-trainer` and `TUNEWARD_IMAGE_TRAINER`; a flag wins over the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings. Times are seconds."""

    kubeconfig: str = _setting("", "kubeconfig file; empty: the pod's service account, else KUBECONFIG or ~/.kube/config")
    namespaces: tuple[str, ...] = _setting((), "namespaces to watch, comma-separated; empty: all of them")
    image_trainer: str = _setting("tuneward-trainer", "image of a job's pods; pinned when the job is accepted")
    image_pull_secrets: tuple[str, ...] = _setting(
        (), "Secrets for pulling images, in each job's namespace, comma-separated"
    )
    image_server: str = _setting("tuneward-server", "image of model servers")
    poll_seconds: float = _setting(5.0, "time between two looks at a leader's progress")
    poll_rate: float = _setting(50.0, "most looks a second, over all jobs")
    stale_seconds: float = _setting(120.0, "a leader that gave no answer for so long is reported as ProgressStale")
    progress_seconds: float = _setting(30.0, "least time between two status writes for progress below one percent")
    storage_class: str = _setting("", "storage class of stores that the operator makes; empty: the cluster's default")
    storage_size: str = _setting("100Gi", "size of stores that the operator makes")
    storage_access_mode: str = _setting("ReadWriteMany", "access mode of stores that the operator makes")
    gpu_resource: str = _setting("nvidia.com/gpu", "name under which nodes offer GPUs")
    network_policy_namespaces: tuple[str, ...] = _setting(
        (),
        "namespaces whose pods may read the workers' progress (the operator's own, Prometheus'), comma-separated; with any, "
        "each job gets a NetworkPolicy that lets nobody else in; empty: none is made",
    )
    run_as_user: int = _setting(65532, "uid of all pods; below 0: left to the cluster (OpenShift)")
    fs_group: int = _setting(65532, "group of the volumes; below 0: left to the cluster (OpenShift)")
    worker_cpu: str = _setting("2", "CPU request of a worker that names none")
    worker_cpu_limit: str = _setting("8", "CPU limit of a worker that names neither request nor limit")
    worker_memory: str = _setting("4Gi", "memory request of a worker that names none")
    worker_memory_limit: str = _setting("16Gi", "memory limit of a worker that names none")
    helper_cpu: str = _setting("1", "CPU request of prepare and finish")
    helper_cpu_limit: str = _setting("4", "CPU limit of prepare and finish")
    helper_memory: str = _setting("2Gi", "memory request of prepare and finish")
    helper_memory_limit: str = _setting("16Gi", "memory limit of prepare and finish")
    retry_seconds: float = _setting(5.0, "wait before the first retry of a kind of failure; it doubles, up to 300")
    sweep_seconds: float = _setting(600.0, "time between two searches for objects that vanished unseen")
    resync_seconds: float = _setting(600.0, "every object is looked at again after this time, give or take a tenth")
    reconcilers: int = _setting(16, "passes at the same time")
    requests_per_second: float = _setting(300.0, "most requests a second to the API server; bursts of half as many again")
    health_host: str = _setting("0.0.0.0", "address of /livez, /healthz and /metrics")
    health_port: int = _setting(8080, "port of /livez, /healthz and /metrics; 0: none")
    log_format: Literal["json", "text"] = _setting("json", "json: one object a line; text: for people")
    log_level: str = _setting("INFO", "DEBUG, INFO, WARNING or ERROR")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field; absent flags stay absent so that the environment can speak."""
    for item in fields(Settings):
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar=_type_of(item.default).__name__.upper(),
            help=f"{item.metadata['help']} (default: {_shown(item.default)})",
        )


def settings_from(arguments: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Raises ValueError naming the setting for a value that is no number where one is needed, or not one of the choices."""
    chosen: dict[str, Any] = {}
    for item in fields(Settings):
        variable = "TUNEWARD_" + item.name.upper()
        text = arguments.get(item.name, environment.get(variable))
        if text is not None:
            chosen[item.name] = _parse(item.name, str(text), item.default)
    return Settings(**chosen)


def parse_command(arguments: Sequence[str]) -> Settings:
    """`run [flags]`, as the image's entry point gets it."""
    parser = argparse.ArgumentParser(prog="tuneward_operator", description="The Tuneward operator.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_flags(commands.add_parser("run", help="watch the cluster until SIGTERM"))
    found = vars(parser.parse_args(arguments))
    try:
        return settings_from(found)
    except ValueError as error:
        parser.error(str(error))


_CHOICES: dict[str, tuple[str, ...]] = {
    "log_format": ("json", "text"),
    "storage_access_mode": ("ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}


def _parse(name: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name in _CHOICES and text not in _CHOICES[name]:
        raise ValueError(f"{name} is {text!r}; allowed: {', '.join(_CHOICES[name])}")
    try:
        return _type_of(default)(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; it must be a number") from error


def _type_of(default: Any) -> type:
    return str if isinstance(default, tuple) else type(default)


def _shown(default: Any) -> str:
    return "none" if default in ("", ()) else str(default)
