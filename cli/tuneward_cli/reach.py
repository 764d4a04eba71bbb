"""A way to a model server's pod from this machine.

Pods of the local cluster are on loopback and reached directly; any other through the API server's port-forward, which
needs no route to the pod network and no rights but `pods/portforward`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tuneward_api.names import ENGINE_PORT, LABEL_SERVER
from tuneward_cli.errors import CommandError, RefusedError
from tuneward_cli.kube import PODS, SERVERS, Json, Kind, Kube

SECRETS = Kind("v1", "secrets")


def the_server(kube: Kube, name: str | None) -> Json:
    """The ModelServer called `name`, or the only one."""
    found = [item for item in kube.list(SERVERS) if name in (None, item["metadata"]["name"])]
    if len(found) == 1:
        return found[0]
    if not found:
        what = f"no ModelServer {name}" if name else "no ModelServer"
        raise CommandError(f"{what} in namespace {kube.namespace}", paste="kubectl apply -f examples/finetune.yaml")
    names = ", ".join(item["metadata"]["name"] for item in found)
    raise CommandError(f"several ModelServers: {names}", paste=f"tuneward chat --server {found[0]['metadata']['name']}")


def ready_pod(kube: Kube, server: str) -> Json:
    """One that answers, and is not on its way out."""
    for pod in kube.list(PODS, f"{LABEL_SERVER}={server}"):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        conditions = (pod.get("status") or {}).get("conditions") or []
        if any(item["type"] == "Ready" and item["status"] == "True" for item in conditions):
            return pod
    raise CommandError(f"no replica of the ModelServer {server} answers yet", paste=f"kubectl describe msv {server}")


def api_key(kube: Kube, server: Mapping[str, Any]) -> str:
    """Of a server that wants one: $TUNEWARD_API_KEY, else its Secret."""
    reference = server["spec"].get("apiKeySecretRef")
    if own := os.environ.get("TUNEWARD_API_KEY", ""):
        return own
    if not reference:
        return ""
    try:
        secret = kube.get(SECRETS, reference["name"]) or {}
    except RefusedError as refused:
        raise CommandError(refused.message, paste="TUNEWARD_API_KEY=... tuneward chat") from refused
    return base64.b64decode((secret.get("data") or {}).get("token", "")).decode()


@contextmanager
def base_url(kube: Kube, pod: Mapping[str, Any], port: int = ENGINE_PORT) -> Iterator[str]:
    """http://HOST:PORT of the pod's port, for as long as the block lasts."""
    address = str(pod["status"]["podIP"])
    if address.startswith("127."):
        yield f"http://{address}:{port}"
        return
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ended = threading.Event()
        stack.callback(ended.set)
        arguments = (kube, str(pod["metadata"]["name"]), port, listener, ended)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(kube: Kube, pod: str, port: int, listener: socket.socket, ended: threading.Event) -> None:
    listener.settimeout(0.5)
    while not ended.is_set():
        try:
            near, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            return
        threading.Thread(target=_carry, args=(kube, pod, port, near), daemon=True).start()


def _carry(kube: Kube, pod: str, port: int, near: socket.socket) -> None:
    """One connection: a websocket to the API server, bytes both ways until one side ends."""
    from kubernetes.stream import portforward

    with near:
        forward = portforward(kube.core().connect_get_namespaced_pod_portforward, pod, kube.namespace, ports=str(port))
        far = forward.socket(port)
        try:
            _copy(near, far)
        except OSError:
            return
        finally:
            forward.close()


def _copy(near: socket.socket, far: Any) -> None:
    other = {near: far, far: near}
    while True:
        readable, _, _ = select.select(list(other), [], [])
        for side in readable:
            data = side.recv(65536)
            if not data:
                return
            other[side].sendall(data)
