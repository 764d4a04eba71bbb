"""The operator in the local cluster: the same chart that a real cluster gets, with no other rights.

An image is only a name there, and the container runs this checkout's Python: the Deployment carries a digest of the
sources, so that an edit followed by `tuneward up` restarts the operator and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from tuneward_api.names import GROUP
from tuneward_cli import process
from tuneward_cli.home import Home, find_program, required_tree
from tuneward_cli.kube import Kind, Kube
from tuneward_cli.voice import Voice

NAMESPACE: Final = "tuneward-system"
RELEASE: Final = "tuneward"
DEPLOYMENT: Final = f"{RELEASE}-operator"
_DEPLOYMENTS: Final = Kind("apps/v1", "deployments", namespaced=True)
_SOURCE: Final = f"{GROUP}/source"


def install(home: Home, voice: Voice) -> None:
    """CRDs, rights and operator, by helm; quick when they are there and nothing was edited."""
    source = _digest(required_tree("the chart"))
    if _available(home, source):
        voice.done("operator: runs already")
        return
    with voice.waiting("operator") as wait:
        process.run(_command(home, source, voice), wait)
        wait.end_with(f"Deployment {DEPLOYMENT} in {NAMESPACE}, by helm")


def available(home: Home) -> bool:
    """Whether the operator's Deployment has a ready pod."""
    return _available(home, None)


def _available(home: Home, source: str | None) -> bool:
    found: dict[str, Any] = Kube.connect(home.kubeconfig, NAMESPACE).get(_DEPLOYMENTS, DEPLOYMENT) or {}
    annotations = found.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
    ready = found.get("status", {}).get("readyReplicas", 0) > 0
    return bool(ready and (source is None or annotations.get(_SOURCE) == source))


def _command(home: Home, source: str, voice: Voice) -> list[str]:
    chart = required_tree("the chart") / "charts" / "tuneward"
    annotation = _SOURCE.replace(".", "\\.")
    return [
        str(_helm(voice)),
        *("upgrade", "--install", RELEASE, str(chart), "--kubeconfig", str(home.kubeconfig)),
        *("--namespace", NAMESPACE, "--create-namespace", "--take-ownership", "--wait", "--timeout", "5m"),
        # The image's entry point is ours to give: a local image is the caller's virtual environment.
        *("--set-json", f"command={json.dumps(['python', '-m', 'tuneward_operator', 'run'])}"),
        *("--set-string", f"podAnnotations.{annotation}={source}"),
        # One machine, few jobs: a person watches, so status follows closely.
        *("--set", "settings.TUNEWARD_POLL_SECONDS=1,settings.TUNEWARD_PROGRESS_SECONDS=2"),
        *("--set", "settings.TUNEWARD_LOG_FORMAT=text"),
    ]


def _helm(voice: Voice) -> Path:
    if (found := find_program("helm")) is not None:
        return found
    root = required_tree("helm")
    with voice.waiting("building helm (minutes, once)") as wait:
        process.run([str(root / "local" / "helm" / "build.sh"), str(root / ".build" / "bin")], wait)
    return root / ".build" / "bin" / "helm"


def _digest(root: Path) -> str:
    """Of what the operator's pod is made of."""
    digest = hashlib.sha256()
    for folder in ("operator", "api", "charts"):
        for file in sorted((root / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
