"""`tuneward up`, `down` and `status`: the local cluster, our kinds in it, and the operator.

The operator comes by the chart, as it would on any cluster (`release.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneward_cli import process, release
from tuneward_cli.errors import NOT_RUNNING, CommandError
from tuneward_cli.home import Home, find_program, required_tree
from tuneward_cli.kube import JOBS, MODELS, SERVERS, Kube
from tuneward_cli.voice import Voice

_OPERATOR = "tuneward_operator"


@dataclass(frozen=True)
class Up:
    """What `up` found or started, so that an interrupted demo takes down only what it brought."""

    home: Home
    started: bool
    version: str


def up(home: Home, voice: Voice) -> Up:
    """A usable cluster with CRDs and operator; quick when all of it is there."""
    binary = _binary(voice)
    found = local_status(home)
    if not found["running"]:
        with voice.waiting("local Kubernetes") as wait:
            process.run([str(binary), "up", "--data", str(home.data), "--detach"], wait)
            found = local_status(home)
            wait.end_with(
                f"{found['version']}, pods as processes of this machine ({found.get('way') or 'control plane only'})"
            )
        started = True
    else:
        voice.done(f"local Kubernetes: {found['version']} runs already")
        started = False
    release.install(home, voice)
    return Up(home, started, found["version"])


def _binary(voice: Voice) -> Path:
    if (found := find_program("tuneward-local")) is not None:
        return found
    root = required_tree("tuneward-local")
    with voice.waiting("building the local Kubernetes (minutes, once)") as wait:
        process.run([str(root / "local" / "build.sh"), str(root / ".build" / "bin")], wait)
    return root / ".build" / "bin" / "tuneward-local"


def local_status(home: Home) -> dict[str, Any]:
    """What tuneward-local says of the data directory; not running when it is not even built."""
    binary = find_program("tuneward-local")
    if binary is None or not home.data.is_dir():
        return {"running": False, "version": ""}
    command = [str(binary), "status", "--data", str(home.data), "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode not in (0, NOT_RUNNING):
        raise CommandError(done.stderr.strip() or "tuneward-local gives no status", paste="tuneward down")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def operator_command(kubeconfig: str, *extra: str) -> list[str]:
    return [sys.executable, "-m", _OPERATOR, "run", "--kubeconfig", kubeconfig, *extra]


def down(home: Home, voice: Voice, *, purge: bool = False) -> None:
    """Ends the operator, every pod and the cluster; the data stays unless `purge`."""
    with voice.waiting("taking the local cluster down"):
        binary = find_program("tuneward-local")
        if binary is None and home.data.is_dir():
            raise CommandError(
                f"tuneward-local is not built, so what runs in {home.data} cannot be ended", paste="make local"
            )
        if binary is not None:
            process.run([str(binary), "down", "--data", str(home.data), *(["--purge"] if purge else [])])


def status(home: Home) -> dict[str, Any]:
    """What runs here and the one next thing to do."""
    found = local_status(home)
    report: dict[str, Any] = {
        "running": bool(found["running"]),
        "version": found["version"],
        "data": str(home.data),
        "kubeconfig": str(home.kubeconfig),
        "operator": bool(found["running"]) and release.available(home),
        "jobs": [],
        "models": [],
        "servers": [],
    }
    if report["running"]:
        kube = Kube.connect(home.kubeconfig)
        for word, kind in (("jobs", JOBS), ("models", MODELS), ("servers", SERVERS)):
            report[word] = [_brief(item) for item in kube.list(kind)]
    return {**report, "next": next_step(report)}


def _brief(item: dict[str, Any]) -> dict[str, Any]:
    state = item.get("status") or {}
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in state.get("conditions") or [])
    return {
        "name": item["metadata"]["name"],
        "phase": state.get("phase") or ("Ready" if ready else "NotReady"),
        "message": state.get("message", ""),
    }


def next_step(report: dict[str, Any]) -> str:
    """One command to paste."""
    if not report["running"]:
        return "tuneward demo   (or, for an empty cluster: tuneward up)"
    if not report["operator"]:
        return "tuneward up"
    unfinished = [job["name"] for job in report["jobs"] if job["phase"] not in ("Succeeded", "Failed", "Cancelled")]
    if unfinished:
        return f"tuneward watch {unfinished[0]}"
    if any(model["phase"] == "Ready" for model in report["models"]):
        return "tuneward chat"
    return f"export KUBECONFIG={report['kubeconfig']}; kubectl apply -f examples/finetune.yaml"


def status_lines(report: dict[str, Any]) -> list[str]:
    """For people."""
    if not report["running"]:
        return [f"no local cluster runs ({report['data']})", f"next: {report['next']}"]
    operator = "runs" if report["operator"] else "does not run"
    lines = [f"local Kubernetes {report['version']} runs; the operator {operator}"]
    for word in ("servers", "jobs", "models"):
        lines += [f"  {word[:-1]} {item['name']}: {item['phase']}{_after(item['message'])}" for item in report[word]]
    return [*lines, f"export KUBECONFIG={report['kubeconfig']}", f"next: {report['next']}"]


def _after(message: str) -> str:
    return f" ({message})" if message else ""
