"""The engine as a process of this machine, with the adapters that `tuneward train` left in a store."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tuneward_api.files import FinishedAdapter
from tuneward_cli.errors import CommandError
from tuneward_cli.finished import Finished, finished
from tuneward_cli.process import end, environment
from tuneward_cli.voice import Voice


def model_folder(store: Path, job: Finished) -> Path:
    """What an engine loads: the base model, or the job's own."""
    if job.adapter.whole:
        return store / job.adapter.folder
    base, request = job.plan.prepared.base, job.plan.request
    if base.claim == request.store_claim:
        return store / base.sub_path
    return store / request.run_directory / "claims" / base.claim / base.sub_path


@contextmanager
def running(store: Path, voice: Voice) -> Iterator[str]:
    """Base URL of an engine with the newest job's base model and every adapter of that base; or with its own model."""
    store = store.absolute()
    jobs = finished(store)
    if not jobs:
        raise CommandError(f"{store} holds no finished job", paste=f"tuneward train examples/finetune.yaml --store {store}")
    newest = jobs[-1]
    adapters = adapters_beside(newest, jobs)
    process, url = _start(model_folder(store, newest), store, options(newest, adapters))
    try:
        with voice.waiting("loading the model"):
            _await(process, url, store)
            for adapter in adapters:
                _load(url, adapter.served_name, store / adapter.folder)
        yield url
    finally:
        end(process.pid)


def adapters_beside(newest: Finished, jobs: Sequence[Finished]) -> list[FinishedAdapter]:
    """Those of the newest job's base model, each name once: two jobs of the same bytes may share one."""
    same = [job.adapter for job in jobs if job.plan.prepared.base.digest == newest.plan.prepared.base.digest]
    found = {} if newest.adapter.whole else {adapter.served_name: adapter for adapter in same if not adapter.whole}
    return list(found.values())


def options(newest: Finished, adapters: Sequence[FinishedAdapter]) -> list[str]:
    """With room for all of them, whatever an engine's own limits are."""
    name = ["--served-base-name", newest.adapter.served_name] if newest.adapter.whole else []
    ranks = [adapter.rank or 0 for adapter in adapters]
    return [*name, "--max-adapters", str(max(1, len(adapters))), "--max-rank", str(max([1, *ranks]))]


def _start(model: Path, store: Path, extra: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tuneward_serving", "engine", "--model", str(model), "--port", str(port)]
    command += extra
    with (store / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"],
            env=environment({"TUNEWARD_ADAPTERS_DIR": str(store / "adapters")}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


def _await(process: subprocess.Popen[bytes], url: str, store: Path) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise CommandError(f"the engine ended with exit code {process.returncode}", paste=f"tail -50 {store / 'engine.log'}")


def _load(url: str, name: str, folder: Path) -> None:
    body = {"lora_name": name, "lora_path": str(folder)}
    answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120, trust_env=False)
    if answer.is_error:
        raise CommandError(f"the engine refused the adapter {name}: {answer.text[:300]}", paste=f"ls {folder}")
