"""A namespace of a real API server, an operator process in it, and a hand that plays the kubelet and the trainer."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from tests.support.api import Object, checked, merge, path
from tests.support.cluster import Cluster
from tests.support.process import killed_after
from tests.support.wait import wait_for

from tuneward_api.names import API_VERSION, TRAINER_PORT

DIGEST = "sha256:" + "ab" * 32
Objects: TypeAlias = list[Object]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Operators:
    """Operator processes of one test process, all quick in their waits."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._own: list[int] = []
        self._shared: int | None = None
        self._started = 0
        command = [sys.executable, str(Path(__file__).parent / "zygote.py")]
        self._zygote = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *flags: str, kubeconfig: Path | None = None) -> int:
        """The pid of a new operator."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        arguments = [
            *("run", "--kubeconfig", str(kubeconfig or self.cluster.kubeconfig), "--image-trainer", "trainer:1"),
            *("--health-port", "0", "--log-format", "text", "--retry-seconds", "0.1", "--poll-seconds", "0.2"),
            *flags,
        ]
        self._started += 1
        log = self.folder / f"operator-{self._started:03}.log"
        self._zygote.stdin.write(json.dumps([arguments, str(log)]) + "\n")
        self._zygote.stdin.flush()
        with killed_after(60, self._zygote):
            pid = int(self._zygote.stdout.readline())
        self._own.append(pid)
        return pid

    def share(self) -> None:
        if self._shared is None:
            self._shared = self.start()
            self._own.remove(self._shared)

    def kill(self, pid: int) -> None:
        """SIGKILL, and back only when it is gone."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.alive(pid), what=f"the end of {pid}", interval=0.005)

    @staticmethod
    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end_own(self) -> None:
        for pid in self._own:
            self.kill(pid)
        self._own.clear()

    def end_shared(self) -> None:
        if self._shared is not None:
            self.kill(self._shared)
            self._shared = None

    def end(self) -> None:
        self.end_own()
        self.end_shared()
        self._zygote.communicate(timeout=30)


class World:
    """Everything is of one namespace. Methods raise AssertionError with what the API server said."""

    def __init__(self, operators: Operators, namespace: str, api: httpx.Client) -> None:
        self.operators = operators
        self.namespace = namespace
        self.api = api
        self.leaders: list[Leader] = []

    # The API

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        return path(kind, self.namespace, name, subresource)

    def create(self, body: Object) -> Object:
        return checked(self.api.post(self.path(body["kind"]), json=body))

    def find(self, kind: str, name: str) -> Object | None:
        answer = self.api.get(self.path(kind, name))
        return None if answer.status_code == 404 else checked(answer)

    def get(self, kind: str, name: str) -> Object:
        return checked(self.api.get(self.path(kind, name)))

    def list(self, kind: str, selector: str = "") -> Objects:
        items: Objects = checked(self.api.get(self.path(kind), params={"labelSelector": selector}))["items"]
        return items

    def patch(self, kind: str, name: str, body: Object, *, subresource: str = "", manager: str = "somebody") -> Object:
        return merge(self.api, self.path(kind, name, subresource), body, manager=manager)

    def delete(self, kind: str, name: str, *, now: bool = False) -> None:
        body: Object = {"propagationPolicy": "Background"}
        if now:
            body["gracePeriodSeconds"] = 0
        answer = self.api.request("DELETE", self.path(kind, name), json=body)
        assert answer.status_code in (200, 202, 404), answer.text

    # The operator

    def operate(self, *flags: str) -> int:
        """An operator of this namespace alone, for tests that kill it or give it other flags."""
        self.operators.end_shared()
        return self.operators.start("--namespaces", self.namespace, *flags)

    def share_operator(self) -> None:
        """The operator of all namespaces that the tests of this process share: a start costs more than most tests."""
        self.operators.share()

    def kill(self, operator: int) -> None:
        self.operators.kill(operator)

    def end(self) -> None:
        self.api.request("DELETE", self.path("FineTuneJob"))
        self.operators.end_own()
        for leader in self.leaders:
            leader.close()

    # The job

    def submit(self, name: str = "bot", *, labels: dict[str, str] | None = None, **spec: Any) -> Object:
        body = {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "metadata": {"name": name, "labels": labels or {}},
            "spec": {
                "model": {"uri": "pvc://tuneward-store/imports/tiny"},
                "datasets": {"training": [{"uri": "configmap://chats/chats.jsonl"}]},
                "workers": {"gpusPerWorker": 0},
                **spec,
            },
        }
        self.ensure_chats()
        return self.create(body)

    def ensure_chats(self) -> None:
        """The ConfigMap that jobs name, which the operator waits for."""
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "chats"}, "data": {"chats.jsonl": "{}"}}
        answer = self.api.post(self.path("ConfigMap"), json=body)
        assert answer.is_success or answer.status_code == 409, answer.text

    def status(self, name: str = "bot") -> Object:
        found: Object = self.get("FineTuneJob", name).get("status", {})
        return found

    def wait_phase(self, phase: str, name: str = "bot", timeout: float = 60) -> Object:
        seen: list[object] = []

        def reached() -> Object | None:
            status = self.status(name)
            if not seen or seen[-1] != (status.get("phase"), status.get("message")):
                seen.append((status.get("phase"), status.get("message")))
            return status if status.get("phase") == phase else None

        try:
            return wait_for(reached, what=f"phase {phase}", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\nphases: {seen}\n{self.logs()}") from error

    def wait_message(self, message: str, name: str = "bot") -> None:
        wait_for(lambda: self.status(name).get("message") == message, what=f"the message {message}", timeout=60)

    def look_again(self, name: str = "bot") -> None:
        """A change that means nothing, which is a pass."""
        self.patch("FineTuneJob", name, {"metadata": {"annotations": {"test/look": secrets.token_hex(4)}}})

    def wait(self, kind: str, name: str) -> Object:
        try:
            return wait_for(lambda: self.find(kind, name), what=f"{kind} {name}", timeout=60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def wait_gone(self, kind: str, name: str) -> None:
        wait_for(lambda: self.find(kind, name) is None, what=f"{kind} {name} to go", timeout=60)

    def logs(self) -> str:
        return "\n".join(file.read_text()[-4000:] for file in sorted(self.operators.folder.glob("*.log"))[-2:])

    def condition(self, kind: str, name: str = "bot") -> Object:
        return next(found for found in self.status(name)["conditions"] if found["type"] == kind)

    # The kubelet's part

    def pods_of(self, job: str, count: int = 1) -> Objects:
        """Living pods of a Job, by index; waits until there are `count`."""

        def enough() -> Objects | None:
            pods = self.list("Pod", f"batch.kubernetes.io/job-name={job}")
            living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
            return living if len(living) >= count else None

        return sorted(wait_for(enough, what=f"{count} pods of {job}", timeout=60), key=lambda pod: pod["metadata"]["name"])

    def runs(self, pod: Object, ip: str = "") -> None:
        state = {"running": {"startedAt": now()}}
        self._pod_status(pod, "Running", state, ready=True, ip=ip)

    def ends(self, pod: Object, exit_code: int, message: Object | str = "", reason: str = "") -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        state = {
            "terminated": {
                "exitCode": exit_code,
                "reason": reason or ("Completed" if exit_code == 0 else "Error"),
                "message": text,
                "startedAt": now(),
                "finishedAt": now(),
            }
        }
        self._pod_status(pod, "Succeeded" if exit_code == 0 else "Failed", state, ready=False)

    def _pod_status(self, pod: Object, phase: str, state: Object, *, ready: bool, ip: str = "") -> None:
        container = {
            "name": pod["spec"]["containers"][0]["name"],
            "image": "x",
            "imageID": "x",
            "restartCount": 0,
            "ready": ready,
            "state": state,
        }
        status: Object = {
            "phase": phase,
            "containerStatuses": [container],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        if ip:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        self.patch("Pod", pod["metadata"]["name"], {"status": status}, subresource="status", manager="kubelet")

    # The trainer's part

    def prepare_done(self, name: str = "bot") -> None:
        (pod,) = self.pods_of(f"{name}-prepare")
        self.ends(pod, 0, prepare_report())

    def finish_done(self, name: str = "bot") -> None:
        (pod,) = self.pods_of(f"{name}-finish")
        self.ends(pod, 0, finish_report())

    def leader(self, pod: Object, **progress: Any) -> Leader:
        """Runs the pod with an HTTP port that tells `progress`."""
        leader = Leader(pod["metadata"]["uid"], progress)
        self.leaders.append(leader)
        self.runs(pod, leader.ip)
        return leader


class Leader:
    """A worker's port 8787 on a loopback address of its own."""

    def __init__(self, pod_uid: str, progress: Object) -> None:
        self.progress: Object = {"podUID": pod_uid, "phase": "Training", "steps": 100, **progress}
        self.ip = f"127.{secrets.randbelow(100) + 100}.{secrets.randbelow(254) + 1}.{secrets.randbelow(254) + 1}"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(outer.progress).encode()
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer((self.ip, TRAINER_PORT), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def prepare_report() -> Object:
    return {
        "outcome": "Done",
        "reason": "Validated",
        "message": "ok",
        "prepared": {
            "base": {
                "uri": "pvc://tuneward-store/imports/tiny",
                "key": "k1",
                "digest": DIGEST,
                "architecture": "LlamaForCausalLM",
                "parameters": 1000,
                "claim": "tuneward-store",
                "subPath": "imports/tiny",
            },
            "data": {
                "subPath": "data/d1",
                "summary": {"digest": DIGEST, "samples": 10, "tokens": 100, "targetTokens": 50, "validationSamples": 0},
            },
            "method": {
                "type": "LoRA",
                "rank": 16,
                "alpha": 32,
                "dropout": 0,
                "rsLoRA": False,
                "targetModules": ["q_proj"],
                "trainableParameters": 10,
            },
            "hyperparameters": {
                "epochs": 3,
                "steps": 100,
                "learningRate": 0.0004,
                "scheduler": "Cosine",
                "warmupFraction": 0.05,
                "weightDecay": 0,
                "maxGradNorm": 1,
                "sequenceLength": 128,
                "batchTokens": 4096,
                "seed": 0,
            },
            "packing": {"mode": "Packed", "reason": "agrees", "patches": []},
        },
    }


def result(pod: Object, attempt: int, *, outcome: str = "Succeeded", exit_code: int = 0, **more: Any) -> Object:
    reason = {"Succeeded": "Succeeded", "Stopped": "Preempted"}.get(outcome, "Unknown")
    return {
        "attempt": attempt,
        "podUID": pod["metadata"]["uid"],
        "planDigest": DIGEST,
        "outcome": outcome,
        "exitCode": exit_code,
        "reason": reason,
        "message": outcome,
        "step": 100,
        "steps": 100,
        "finishedAt": now(),
        **more,
    }


def saved(step: int) -> Object:
    return {"step": step, "digest": DIGEST, "savedAt": now(), "directory": f"checkpoints/step-{step:08}"}


def finish_report() -> Object:
    return {
        "outcome": "Done",
        "reason": "Succeeded",
        "message": "ok",
        "adapter": {
            "subPath": f"adapters/sha256-{DIGEST.removeprefix('sha256:')}",
            "digest": DIGEST,
            "size": 123,
            "rank": 16,
            "alpha": 32,
            "targetModules": ["q_proj"],
            "servedName": "ft:tiny:bot:20261125:abababab",
            "attempt": 1,
            "step": 100,
            "metrics": {"trainLoss": 0.5, "validationLossBefore": 2.5, "validationLossAfter": 1.5, "steps": 100},
        },
    }


def running(world: World, launch: int = 1, **progress: Any) -> Object:
    """Brings the job to Running in its `launch`-th Job; gives the leader's pod."""
    if launch == 1:
        world.prepare_done()
    (pod,) = world.pods_of(f"bot-a{launch}")
    world.leader(pod, **{"attempt": launch, "step": 10, **progress})
    world.wait_phase("Running")
    wait_for(lambda: world.status().get("attemptCount") == launch, what=f"attempt {launch} in status", timeout=60)
    return pod
