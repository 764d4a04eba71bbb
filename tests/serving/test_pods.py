"""A ModelServer on the local cluster: real pods, real engine, real agent; nothing is played by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from tests.serving.tiny import make_adapter, make_model
from tests.support.cluster import Cluster, install_crds, running_cluster
from tests.support.wait import wait_for

from tuneward_api.files import WantedAdapter
from tuneward_api.manifest import write_manifest
from tuneward_api.names import API_VERSION, ENGINE_PORT, LABEL_SERVER

pytestmark = pytest.mark.pods

SECONDS = 400
"""Not to be reached: torch alone takes 10 s to import on two busy cores, and pods are several processes."""


@contextmanager
def running_operator(cluster: Cluster, log: Path) -> Iterator[Callable[[], None]]:
    """Yields what kills it."""
    flags = ["--kubeconfig", str(cluster.kubeconfig), "--health-port", "0", "--log-format", "text"]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "tuneward_operator", "run", *flags], stdout=file, stderr=file)

    def kill() -> None:
        process.kill()
        process.wait()

    try:
        yield kill
    finally:
        kill()


def fill_store(cluster: Cluster, namespace: str, model: Path, adapters: Path) -> None:
    """By a pod, as `tuneward import` and `finish` would."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "tuneward-store"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    copy = f"mkdir /mnt/store/imports && cp -r {model} /mnt/store/imports/tiny && cp -r {adapters} /mnt/store/adapters"
    container = {
        "name": "fill",
        "image": "any",
        "command": ["sh", "-c", copy],
        "volumeMounts": [{"name": "store", "mountPath": "/mnt/store"}],
    }
    volume = {"name": "store", "persistentVolumeClaim": {"claimName": "tuneward-store"}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "fill"},
        "spec": {"restartPolicy": "Never", "containers": [container], "volumes": [volume]},
    }
    for body in (claim, pod):
        cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    wait_for(lambda: _phase(cluster, namespace) == "Succeeded", what="the filled store", timeout=SECONDS)


def _phase(cluster: Cluster, namespace: str) -> str:
    return cluster.kubectl("get", "-n", namespace, "pod/fill", "-o", "jsonpath={.status.phase}")


def objects(base_digest: str, adapter: WantedAdapter) -> list[dict[str, object]]:
    server = {
        "apiVersion": API_VERSION,
        "kind": "ModelServer",
        "metadata": {"name": "assistant"},
        "spec": {"model": {"uri": "pvc://tuneward-store/imports/tiny"}, "resources": {"requests": {"cpu": "100m"}}},
    }
    uri = "pvc://tuneward-store/imports/tiny"
    model = {
        "apiVersion": API_VERSION,
        "kind": "FineTunedModel",
        "metadata": {"name": "bot-1", "labels": {LABEL_SERVER: "assistant"}},
        "spec": {
            "servedName": adapter.name,
            "source": {"job": "bot", "uid": "u", "attempt": 1, "step": 1},
            "base": {"uri": uri, "digest": base_digest, "architecture": "LlamaForCausalLM"},
            "artifact": {
                "uri": f"pvc://tuneward-store/adapters/{adapter.path}",
                "digest": adapter.digest,
                "size": 1,
            },
            "adapter": {"rank": adapter.rank, "alpha": 8, "targetModules": ["q_proj"]},
        },
    }
    return [server, model]


def process_of(pod_ip: str, word: str) -> int:
    """The container's process as the machine sees it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if {b"tuneward_serving", word.encode()} <= set(words) and f"POD_IP={pod_ip}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of {word} with the address {pod_ip}")


def test_a_model_is_served_by_pods_and_again_after_a_crash_with_the_operator_gone(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    base_digest = write_manifest(model)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    adapter = make_adapter(adapters, model, name="ft:tiny:bot:20261125:00000001")
    with running_cluster() as cluster, running_operator(cluster, tmp_path / "operator.log") as kill_operator:
        install_crds(cluster)
        namespace = cluster.namespace()
        fill_store(cluster, namespace, model, adapters)
        for body in objects(base_digest, adapter):
            cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))

        def served() -> bool:
            found = cluster.get("-n", namespace, "ftm/bot-1").get("status", {})
            return found.get("conditions", [{}])[0].get("reason") == "Served"

        try:
            wait_for(served, what="a served model", timeout=SECONDS, interval=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{_story(cluster, namespace, tmp_path)}") from error
        ip = cluster.kubectl("get", "-n", namespace, "pod", "-l", LABEL_SERVER, "-o", "jsonpath={.items[0].status.podIP}")
        with OpenAI(base_url=f"http://{ip}:{ENGINE_PORT}/v1", api_key="none") as client:
            assert {one.id for one in client.models.list()} == {"tiny", adapter.name}
            tuned = _answer(client, adapter.name)
            assert tuned != _answer(client, "tiny")
            kill_operator()
            os.kill(process_of(ip, "engine"), signal.SIGKILL)
            wait_for(lambda: not _names(ip), what="the crash", timeout=SECONDS)
            wait_for(lambda: adapter.name in _names(ip), what="the adapter to come back", timeout=SECONDS)
            assert _answer(client, adapter.name) == tuned


def _answer(client: OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="Hello", max_tokens=8, temperature=0).choices[0].text


def _names(ip: str) -> set[str]:
    try:
        answer = httpx.get(f"http://{ip}:{ENGINE_PORT}/v1/models", trust_env=False, timeout=30)
        return {card["id"] for card in answer.json()["data"]} if answer.is_success else set()
    except httpx.TransportError:
        return set()


def _story(cluster: Cluster, namespace: str, folder: Path) -> str:
    told = [cluster.try_kubectl("-n", namespace, "get", "msv,ftm,jobs,deploy,pods", "-o", "wide").stdout]
    told.append(cluster.try_kubectl("-n", namespace, "describe", "msv,pods").stdout[-6000:])
    for pod in cluster.try_kubectl("-n", namespace, "get", "pods", "-o", "name").stdout.split():
        told.append(cluster.try_kubectl("-n", namespace, "logs", pod, "--all-containers", "--tail=30").stdout)
    return "\n".join([*told, (folder / "operator.log").read_text()[-3000:]])
