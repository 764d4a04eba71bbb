"""`tuneward import DIR NAME`: a model folder of this machine goes into a store, by hand, without any hub.

In a cluster a pod mounts the store and a tar stream goes to it over exec, since a volume has no other door. On a
workstation it is a copy. Both end in a folder with a manifest, and both do nothing when it is there already.
"""

from __future__ import annotations

import json
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneward_api import manifest
from tuneward_api.names import DEFAULT_STORE_CLAIM, LABEL_ROLE, ExitCode, claim_label, hashed
from tuneward_cli import receive
from tuneward_cli.errors import USAGE, CommandError, RefusedError
from tuneward_cli.kube import CLAIMS, PODS, Kind, Kube
from tuneward_cli.voice import Voice, Wait
from tuneward_cli.words import size

_CHUNK: Final = 1 << 18
_START_TIMEOUT: Final = 300.0
_ALL_DEPLOYMENTS: Final = Kind("apps/v1", "deployments", namespaced=False)


@dataclass(frozen=True)
class Source:
    """A model folder and what is in it."""

    folder: Path
    entries: list[manifest.Entry]

    @property
    def digest(self) -> str:
        return manifest.digest_of(self.entries)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)


def read_source(folder: Path, voice: Voice) -> Source:
    """Raises CommandError for what is no model folder, and for a folder that its own manifest disowns."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise CommandError(
            f"{folder} is no model folder: it must hold config.json and *.safetensors",
            paste=f"ls {folder}",
            code=ExitCode.INPUT_MISSING,
        )
    with voice.waiting(f"reading {folder}"):
        try:
            if (folder / manifest.MANIFEST).exists():
                manifest.verify(folder)
                return Source(folder, manifest.read_manifest(folder)[1])
            return Source(folder, manifest.scan(folder))
        except manifest.ManifestError as error:
            raise CommandError(str(error), paste=f"rm {folder / manifest.MANIFEST}", code=ExitCode.INPUT_MISSING) from error


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][-._A-Za-z0-9]{0,62}", name):
        raise CommandError(
            f"{name!r} must be letters, digits, '.', '_' and '-', 63 at most",
            paste="tuneward import DIR my-model",
            code=USAGE,
        )
    return name


def import_here(source: Source, name: str, store: Path, voice: Voice, *, replace: bool = False) -> str:
    """Copies into a workstation's store. Returns the address."""
    target = store / "imports" / name
    if not _needed(receive.held(target), source, name, replace):
        voice.done(f"{target} holds it already")
        return _uri(name)
    with voice.waiting(f"copying {size(source.bytes)} to {target}"):
        (target / manifest.MANIFEST).unlink(missing_ok=True)
        entries = []
        for entry in source.entries:
            with (source.folder / entry.path).open("rb") as content:
                entries.append(receive.write_file(content, target, entry.path))
        try:
            receive.complete(target, entries, source.digest)
        except manifest.ManifestError as error:
            raise CommandError(
                f"{source.folder} changed while it was copied: {error}", paste=f"tuneward import {source.folder} {name}"
            ) from error
    return _uri(name)


def _needed(held: str, source: Source, name: str, replace: bool) -> bool:
    if held and held != source.digest and not replace:
        raise CommandError(
            f"imports/{name} holds another model ({held[:19]}); jobs may be using it",
            paste=f"tuneward import {source.folder} {name}-2   (or add --replace)",
        )
    return held != source.digest


def _uri(name: str) -> str:
    return f"pvc://{DEFAULT_STORE_CLAIM}/imports/{name}"


def import_there(source: Source, name: str, kube: Kube, voice: Voice, *, image: str = "", replace: bool = False) -> str:
    """Streams into the store of a namespace. Returns the address."""
    settings = operator_settings(kube)
    if kube.get(CLAIMS, DEFAULT_STORE_CLAIM) is None:
        kube.create(CLAIMS, store_claim(settings))
        voice.done(f"store: {DEFAULT_STORE_CLAIM} made in namespace {kube.namespace}")
    with _receiver(kube, pod(name, settings, image), voice) as receiver:
        folder = f"/mnt/store/imports/{name}"
        if not _needed(_ask(kube, receiver, ["held", folder]), source, name, replace):
            voice.done(f"model: {_uri(name)} is there already")
            return _uri(name)
        with voice.waiting(f"model: {size(source.bytes)} to {_uri(name)}") as wait:
            _send(kube, receiver, ["unpack", folder, source.digest], source, wait)
            wait.end_with("every file checked")
    return _uri(name)


def operator_settings(kube: Kube) -> dict[str, str]:
    """The installed operator's environment: our pod runs as its pods do. Empty where it cannot be read."""
    try:
        found = kube.list(_ALL_DEPLOYMENTS, "app.kubernetes.io/component=operator")
    except RefusedError:
        return {}
    for item in found:
        for container in item["spec"]["template"]["spec"]["containers"]:
            pairs = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
            if any(key.startswith("TUNEWARD_") for key in pairs):
                return pairs
    return {}


def store_claim(settings: Mapping[str, str]) -> dict[str, Any]:
    """The volume as the operator would make it."""
    storage_class = settings.get("TUNEWARD_STORAGE_CLASS", "")
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": DEFAULT_STORE_CLAIM},
        "spec": {
            "accessModes": [settings.get("TUNEWARD_STORAGE_ACCESS_MODE") or "ReadWriteMany"],
            "resources": {"requests": {"storage": settings.get("TUNEWARD_STORAGE_SIZE") or "100Gi"}},
            **({"storageClassName": storage_class} if storage_class else {}),
        },
    }


def pod(name: str, settings: Mapping[str, str], image: str = "") -> dict[str, Any]:
    """Mounts the store and waits; as restricted as a job's own pods, and the same user."""
    held = {claim_label(DEFAULT_STORE_CLAIM): ""}
    together = {"labelSelector": {"matchLabels": held}, "topologyKey": "kubernetes.io/hostname"}
    user, group = (int(settings.get(key) or 65532) for key in ("TUNEWARD_RUN_AS_USER", "TUNEWARD_FS_GROUP"))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": hashed(f"tuneward-import-{name.lower().replace('_', '-').replace('.', '-')}"),
            "labels": {LABEL_ROLE: "import", **held},
        },
        "spec": {
            # Of a store that one node at a time can mount, all pods carry this label; of others only those like this one.
            "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [together]}},
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 6 * 3600,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
                **({"runAsUser": user, "runAsGroup": user} if user >= 0 else {}),
                **({"fsGroup": group} if group >= 0 else {}),
            },
            "containers": [
                {
                    "name": "receiver",
                    "image": image or settings.get("TUNEWARD_IMAGE_TRAINER") or "tuneward-trainer",
                    "command": ["python", "-m", "tuneward_cli.receive", "wait"],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "store", "mountPath": "/mnt/store"}],
                }
            ],
            "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": DEFAULT_STORE_CLAIM}}],
        },
    }


@contextmanager
def _receiver(kube: Kube, document: dict[str, Any], voice: Voice) -> Iterator[str]:
    """Name of a running receiver; the pod is gone afterwards, whatever happened."""
    name = document["metadata"]["name"]
    kube.delete(PODS, name, gone_within=60)
    kube.create(PODS, document)
    try:
        with voice.waiting("a pod that receives the model") as wait:
            _await_running(kube, name, wait)
        yield name
    finally:
        kube.delete(PODS, name)


def _await_running(kube: Kube, name: str, wait: Wait) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        found = kube.get(PODS, name) or {}
        phase, why = found.get("status", {}).get("phase"), waits_for(found)
        if phase == "Running":
            return
        if phase in ("Failed", "Succeeded") or time.monotonic() > deadline:
            raise CommandError(
                f"the pod {name} does not run: {why or phase}", paste=f"kubectl describe pod {name} -n {kube.namespace}"
            )
        wait.say(why)
        time.sleep(0.3)


def waits_for(found: Mapping[str, Any]) -> str:
    """Why a pod is not running yet, in the cluster's own words."""
    status = found.get("status", {})
    for container in status.get("containerStatuses") or []:
        state = (container.get("state") or {}).get("waiting") or {}
        if state.get("reason") and state["reason"] != "ContainerCreating":
            return f"{state['reason']}: {state.get('message', '')}".strip(": ")
    for item in status.get("conditions") or []:
        if item["type"] == "PodScheduled" and item["status"] != "True":
            return str(item.get("message", ""))
    return ""


def _ask(kube: Kube, name: str, arguments: list[str]) -> str:
    """Runs the receiver's command; its digest."""
    socket = _exec(kube, name, arguments, stdin=False)
    socket.run_forever(timeout=600)
    return _answer(socket.read_stdout(timeout=1))


def _send(kube: Kube, name: str, arguments: list[str], source: Source, wait: Wait) -> None:
    socket = _exec(kube, name, arguments, stdin=True)
    started, sent = time.monotonic(), 0

    class Pipe:
        """What tarfile writes goes out as frames."""

        def write(self, data: bytes) -> int:
            nonlocal sent
            socket.write_stdin(bytes(data))
            sent += len(data)
            rate = sent / max(0.1, time.monotonic() - started)
            wait.say(f"{size(sent)} of {size(source.bytes)}, {size(rate)}/s")
            return len(data)

    try:
        pack(source, Pipe())
        socket.run_forever(timeout=600)
        if _answer(socket.read_stdout(timeout=1)) != source.digest:
            raise CommandError("the model did not arrive whole", paste=f"tuneward import {source.folder} NAME")
    finally:
        socket.close()


def pack(source: Source, pipe: Any) -> None:
    """A tar stream of the entries, in order."""
    with tarfile.open(fileobj=pipe, mode="w|", bufsize=_CHUNK, format=tarfile.PAX_FORMAT) as archive:
        for entry in source.entries:
            info = tarfile.TarInfo(entry.path)
            info.size = entry.size
            with (source.folder / entry.path).open("rb") as content:
                archive.addfile(info, content)


def _exec(kube: Kube, name: str, arguments: list[str], *, stdin: bool) -> Any:
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream import stream

    try:
        return stream(
            kube.core().connect_get_namespaced_pod_exec,
            name,
            kube.namespace,
            container="receiver",
            command=["python", "-m", "tuneward_cli.receive", *arguments],
            stdin=stdin,
            stdout=True,
            stderr=True,
            tty=False,
            binary=True,
            _preload_content=False,
        )
    except ApiException as error:
        raise CommandError(
            f"exec into {name} is refused: {error.reason}", paste=f"kubectl auth can-i create pods/exec -n {kube.namespace}"
        ) from error


def _answer(output: bytes) -> str:
    try:
        found = json.loads(output)
    except ValueError as error:
        raise CommandError("the receiving pod gave no answer", paste="tuneward import DIR NAME") from error
    if found["error"]:
        raise CommandError(f"the store refused the model: {found['error']}", paste="kubectl get pvc tuneward-store")
    return str(found["digest"])
