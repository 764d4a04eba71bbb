"""A real control plane for tests: one per test process, on its own ports and data directory."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.api import checked, client, path
from tests.support.process import killed_after
from tests.support.wait import wait_for

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".build" / "bin"
BINARY = BIN / "tuneward-local"
SANDBOX = Path(__file__).parent / "sandbox.py"


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `kubectl` raises AssertionError with what kubectl said."""

    data: Path
    kubeconfig: Path

    def try_kubectl(
        self, *arguments: str, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BINARY), "kubectl", "--kubeconfig", str(self.kubeconfig), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        done = self.try_kubectl(*arguments, stdin=stdin, timeout=timeout)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}{done.stdout}"
        return done.stdout

    def get(self, *arguments: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def namespace(self) -> str:
        """A fresh one that pods can be made in; nobody waits for its deletion, which takes seconds."""
        name = f"t-{secrets.token_hex(4)}"
        with client(self.kubeconfig) as api:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            checked(api.post("/api/v1/namespaces", json=body))
            account = path("ServiceAccount", name, "default")
            wait_for(lambda: api.get(account).is_success, what=f"the service account of {name}", interval=0.02)
        return name


@contextmanager
def running_cluster(*flags: str) -> Iterator[Cluster]:
    """`tuneward-local up FLAGS` in a temporary directory, taken down whatever happens."""
    assert BINARY.exists(), f"{BINARY} is missing; run: make local"
    data = Path(tempfile.mkdtemp(prefix="tuneward-test-"))
    process = subprocess.Popen(
        [str(BINARY), "up", "--data", str(data), "--no-fsync", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Its own session: a Ctrl-C of the test run reaches us, and we take it down in order.
        start_new_session=True,
        env={**os.environ, "VIRTUAL_ENV": str(ROOT / ".venv"), "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"},
    )
    try:
        assert process.stdout is not None
        said = []
        with killed_after(180, process):
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready "):
                    break
            else:
                raise AssertionError(f"the cluster did not start: {''.join(said)}")
        yield Cluster(data=data, kubeconfig=data / "kubeconfig")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        subprocess.run([str(BINARY), "down", "--data", str(data), "--purge"], check=False, capture_output=True, timeout=60)
        shutil.rmtree(data, ignore_errors=True)


def install_crds(cluster: Cluster) -> None:
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))
