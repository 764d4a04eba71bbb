"""The engine and the agent as real processes on free ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
from openai import OpenAI
from tests.support.wait import wait_for

from tuneward_api.files import AdapterProof, AgentReport, WantedAdapter, WantedAdapters

SECONDS = 300
"""Importing torch alone takes 10 s on two busy cores; this is not to be reached."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass
class Served:
    """`python -m tuneward_serving ...`; `start` may be called again after `kill`, on the same port."""

    arguments: list[str]
    ready_path: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=SECONDS, trust_env=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "tuneward_serving", *self.arguments, "--host", "127.0.0.1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            )

    def wait_ready(self) -> None:
        wait_for(self._ready, what=f"{self.url}{self.ready_path}", timeout=SECONDS)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.arguments[0]} ended: {self.log.read_text()}"
        try:
            return self.get(self.ready_path).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()


class Engine(Served):
    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.environment.get("TUNEWARD_API_KEY", "none"), max_retries=0)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.key, timeout=SECONDS, trust_env=False)

    def stop(self) -> int:
        self.client.close()
        return super().stop()

    @property
    def key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment.get('TUNEWARD_API_KEY', 'none')}"}

    def names(self) -> set[str]:
        return {model.id for model in self.client.models.list()}

    def logprobs(self, model: str, ids: list[int]) -> list[float]:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        entries = self.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:], strict=True)]


class AgentProcess(Served):
    """Its wanted list is the file `wanted`, written as the operator would."""

    def want(self, wanted: list[WantedAdapter]) -> None:
        new = self.wanted.with_suffix(".new")
        new.write_text(WantedAdapters(adapters=wanted).model_dump_json(by_alias=True))
        new.replace(self.wanted)

    @property
    def wanted(self) -> Path:
        return Path(self.arguments[self.arguments.index("--wanted") + 1])

    def report(self) -> AgentReport:
        return AgentReport.model_validate_json(self.get("/adapters").content)

    def settled(self, wanted: list[WantedAdapter]) -> dict[str, AdapterProof]:
        """Every verdict, once all are there."""
        asked = WantedAdapters(adapters=wanted).digest()

        def done() -> AgentReport | None:
            report = self.report()
            answered = report.wanted_digest == asked and all(one.reason != "Loading" for one in report.adapters)
            return report if answered else None

        report = wait_for(done, what="every verdict", timeout=SECONDS)
        return {one.name: one for one in report.adapters}


@contextmanager
def running(served: Served) -> Iterator[None]:
    served.start()
    try:
        served.wait_ready()
        yield
    finally:
        served.stop()
