"""A cluster with its node, started the way a person does, as this user or as one without privileges.

`tests.support.cluster` gives other tests a usable cluster; here the program itself is what is tested, so the
helper shows its processes: it can be killed, started again on the same directory, and taken down.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from tests.support.api import Object, checked, client, path
from tests.support.cluster import BIN, BINARY, ROOT, SANDBOX, Cluster
from tests.support.process import bounded, killed_after
from tests.support.wait import wait_for

NOBODY = 65534
"""The user of the unprivileged cluster: it owns nothing and has no home, which is the hardest case."""

START_DEADLINE = 120
"""Seconds for `up`. It takes 3 on an idle machine: this only ends a start that hangs."""


HOST_FOLDERS = ("/var/log", "/var/lib", "/usr/libexec")
"""Where the kubelet and the controllers write on a machine that is theirs alone."""


@dataclass(frozen=True)
class User:
    """Who runs the program; `uid` None is the user of the tests."""

    name: str
    uid: int | None = None
    bare: bool = False
    """On a machine where no Kubernetes has ever been: its usual folders are empty (needs root)."""
    caged: bool = False
    """In an ordinary Docker container: no mounts, no namespaces. Read-only and runAsUser are not enforced there."""

    def command(self, *arguments: str) -> list[str]:
        command = list(arguments)
        if self.uid is not None:
            command = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--", *command]
        if self.caged:
            command = [sys.executable, str(SANDBOX), *command]
        if self.bare:
            hide = " && ".join(f"mount -t tmpfs -o mode=755 none {folder}" for folder in HOST_FOLDERS)
            command = ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{hide} && exec "$@"', "sh", *command]
        return command

    def environment(self, home: Path) -> dict[str, str]:
        """What the containers start from: for us the virtualenv first, as a shell with it activated has it."""
        if self.uid is None:
            path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
            return {**os.environ, "VIRTUAL_ENV": str(ROOT / ".venv"), "PATH": path}
        return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "GOGC": os.environ["GOGC"]}


ME = User("me")
UNPRIVILEGED = User("unprivileged", NOBODY)
CAGED = User("caged", caged=True)
USERS = [ME, UNPRIVILEGED, CAGED] if os.geteuid() == 0 else [ME, CAGED]


@dataclass
class Machine:
    """A data directory and who uses it. `cluster` works only while the server runs."""

    data: Path
    user: User = ME
    binaries: Path = BIN
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def cluster(self) -> Cluster:
        return Cluster(data=self.data, kubeconfig=self.data / "kubeconfig")

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """`tuneward-local ARGUMENTS --data DIR`, to its end."""
        command = self.user.command(str(self.binaries / BINARY.name), *arguments, "--data", str(self.data))
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False,
            env=self.user.environment(self.data), cwd="/",
        )  # fmt: skip

    def up(self, *flags: str) -> int:
        """Starts the server in the foreground, waits for its ready line and returns its pid."""
        command = self.user.command(str(self.binaries / BINARY.name), "up", "--data", str(self.data), "--no-fsync", *flags)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=self.user.environment(self.data), cwd="/",
        )  # fmt: skip
        self.started.append(process)
        assert process.stdout is not None
        said = []
        with killed_after(180, process):
            for line in process.stdout:
                said.append(line)
                if line.startswith("ready "):
                    return self.server_pid()
        raise AssertionError(f"the cluster did not start: {''.join(said)}{self.log_tail()}")

    def server_pid(self) -> int:
        ready = json.loads((self.data / "ready").read_text())
        return int(ready["pid"])

    def alive(self) -> bool:
        return bool(self.started) and self.started[-1].poll() is None

    def shims(self) -> list[int]:
        """The parents of the containers that run."""
        return [pid for pid, command in self.processes().items() if "tuneward-shim" in command.split(" ", 1)[0]]

    def signal_server(self, number: signal.Signals) -> None:
        """Sends a signal to the program and waits for its end; with SIGKILL that is a crash."""
        os.kill(self.server_pid(), number)
        self.started[-1].wait(timeout=20)

    def down(self, *flags: str) -> None:
        done = self.run("down", *flags, timeout=90)
        assert done.returncode == 0, done.stderr + self.log_tail()

    def reap(self) -> None:
        """Ends what `up` started here and closes its pipes, whatever the test did to it."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def log_tail(self) -> str:
        log = self.data / "local.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""

    def processes(self) -> dict[int, str]:
        """Every process that belongs to the cluster: its command line or its environment names the directory."""
        found = {}
        for pid, command, environment in running():
            if str(self.data) in command or str(self.data) in environment:
                found[pid] = command
        return found

    def host_mounts(self) -> list[str]:
        """Mounts below the directory that the machine sees."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in mounts if f" {self.data}/" in line]


@contextmanager
def machine(user: User = ME) -> Iterator[Machine]:
    """A fresh directory of `user`, and nothing left of it afterwards.

    For a user without privileges the binaries are copied: the working tree may lie where only its owner may go.
    """
    assert BINARY.exists(), f"{BINARY} is missing; run: make local"
    base = Path(tempfile.mkdtemp(prefix="tuneward-local-"))
    base.chmod(0o755)
    home = base / "home"
    home.mkdir(mode=0o755)
    binaries = BIN
    if user.uid is not None:
        os.chown(home, user.uid, user.uid)
        binaries = Path(shutil.copytree(BIN, base / "bin", symlinks=True))
    data = home / "data"
    made = Machine(data, user, binaries)
    try:
        yield made
    finally:
        if data.exists():
            made.run("down", "--purge", timeout=90)
        made.reap()
        shutil.rmtree(base, ignore_errors=True)


def running() -> Iterator[tuple[int, str, str]]:
    """Pid, command line and environment of every process of the machine, except the tests'."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command, environment = read(entry / "cmdline"), read(entry / "environ")
        except OSError:
            continue
        yield int(entry.name), command, environment


def read(arguments: Path) -> str:
    return arguments.read_bytes().replace(b"\0", b" ").decode(errors="replace")


# Pods


def pod(name: str, command: Iterable[str], **spec: Any) -> dict[str, Any]:
    """A pod of one container `main`. `container` adds to it; everything else is the pod's spec."""
    container = {"name": "main", "image": "local", "command": list(command), **spec.pop("container", {})}
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, **spec}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {**spec, "containers": [container]},
    }  # fmt: skip


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-ec", script]


@dataclass(frozen=True)
class Namespace:
    """One namespace: kubectl in it, and without kubectl what tests ask again and again."""

    machine: Machine
    name: str

    @classmethod
    def fresh(cls, machine: Machine) -> Namespace:
        return cls(machine, machine.cluster.namespace())

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        return self.machine.cluster.kubectl("-n", self.name, *arguments, stdin=stdin, timeout=timeout)

    @contextmanager
    def following(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A kubectl that runs on (logs -f, port-forward) until the end of the block."""
        kubeconfig = str(self.machine.cluster.kubeconfig)
        command = [str(BINARY), "kubectl", "--kubeconfig", kubeconfig, "-n", self.name, *arguments]
        with bounded(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
            yield process

    @cached_property
    def api(self) -> httpx.Client:
        return client(self.machine.cluster.kubeconfig)

    def create(self, *objects: Mapping[str, Any]) -> None:
        for body in objects:
            checked(self.api.post(path(body["kind"], self.name), json=body))

    def get(self, kind: str, name: str) -> Object:
        return checked(self.api.get(path(kind, self.name, name)))

    def list(self, kind: str, **selectors: str) -> list[Object]:
        """`labelSelector` or `fieldSelector` choose."""
        items: list[Object] = checked(self.api.get(path(kind, self.name), params=selectors))["items"]
        return items

    def logs(self, name: str, **options: str | int) -> str:
        """`tailLines`, `previous`, …: what the API server's log subresource takes."""
        answer = self.api.get(path("Pod", self.name, name, "log"), params=options)
        assert answer.is_success, answer.text
        return answer.text

    def await_pod(self, name: str, phase: str, timeout: float = 60) -> Object:
        """The pod once it has the phase; any other end of it, or the deadline, shows the pod and its events."""

        def reached() -> Object | None:
            found = self.get("Pod", name)
            now = found["status"].get("phase")
            if now != phase and now in ("Succeeded", "Failed"):
                raise AssertionError(f"{name} is {now}, not {phase}: {self.describe(name)}")
            return found if now == phase else None

        return self._await(reached, name, f"pod {name} to be {phase}", timeout)

    def await_ready(self, name: str) -> Object:
        def ready() -> Object | None:
            found = self.get("Pod", name)
            conditions = found["status"].get("conditions", [])
            return found if {"Ready": "True"} in [{one["type"]: one["status"]} for one in conditions] else None

        return self._await(ready, name, f"pod {name} to be ready", 60)

    def await_job(self, name: str, condition: str, timeout: float = 60) -> Object:
        def reached() -> Object | None:
            found = self.get("Job", name)
            return found if condition in [one["type"] for one in found["status"].get("conditions", [])] else None

        return wait_for(reached, what=f"Job {name} to be {condition}", timeout=timeout)

    def _await(self, reached: Callable[[], Object | None], name: str, what: str, timeout: float) -> Object:
        try:
            return wait_for(reached, what=what, timeout=timeout)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.describe(name)}") from None

    def finish(self, *objects: Mapping[str, Any]) -> str:
        """Creates the objects, waits until the pod, the last of them, succeeded, and returns its log."""
        self.create(*objects)
        name = objects[-1]["metadata"]["name"]
        self.await_pod(name, "Succeeded")
        return self.logs(name)

    def describe(self, name: str) -> str:
        described = self.machine.cluster.try_kubectl("-n", self.name, "describe", "pod", name).stdout
        log = self.machine.cluster.try_kubectl("-n", self.name, "logs", name, "--all-containers", "--tail=20")
        return f"{described}\n--- log\n{log.stdout}{log.stderr}\n--- local.log\n{self.machine.log_tail()}"


def container_of(pod_object: Mapping[str, Any]) -> dict[str, Any]:
    """The status of a pod's first container."""
    status: dict[str, Any] = pod_object["status"]["containerStatuses"][0]
    return status


def claim(name: str, mode: str = "ReadWriteOnce") -> dict[str, Any]:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1Mi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
