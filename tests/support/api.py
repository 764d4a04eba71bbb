"""The tests' own hand on an API server, by plain HTTP.

A call of kubectl costs 150 ms of processor time: tests that polled with it starved what they waited for.
"""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
from pathlib import Path
from typing import Any

import httpx
import yaml

from tuneward_api.names import API_VERSION

Object = dict[str, Any]

PATHS = {
    "FineTuneJob": f"/apis/{API_VERSION}",
    "FineTunedModel": f"/apis/{API_VERSION}",
    "ModelServer": f"/apis/{API_VERSION}",
    "Deployment": "/apis/apps/v1",
    "Job": "/apis/batch/v1",
    "Pod": "/api/v1",
    "ConfigMap": "/api/v1",
    "Service": "/api/v1",
    "Event": "/api/v1",
    "PersistentVolumeClaim": "/api/v1",
    "ServiceAccount": "/api/v1",
    "NetworkPolicy": "/apis/networking.k8s.io/v1",
}


def client(kubeconfig: Path) -> httpx.Client:
    """With the kubeconfig's certificate. No connection is kept: the server may be another process by the next call."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        pem.write(base64.b64decode(user["client-certificate-data"]) + b"\n" + base64.b64decode(user["client-key-data"]))
        pem.flush()
        context.load_cert_chain(pem.name)
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=cluster["server"], verify=context, trust_env=False, timeout=60, limits=limits)


def path(kind: str, namespace: str, name: str = "", subresource: str = "") -> str:
    plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    parts = [PATHS[kind], "namespaces", namespace, plural.lower(), name, subresource]
    return "/".join(part for part in parts if part)


def checked(answer: httpx.Response) -> Object:
    """The object of the answer. Raises AssertionError with what the API server said."""
    assert answer.is_success, f"{answer.request.method} {answer.request.url}: {answer.text}"
    found: Object = answer.json()
    return found


def merge(api: httpx.Client, where: str, body: Object, *, manager: str = "somebody") -> Object:
    headers = {"Content-Type": "application/merge-patch+json"}
    return checked(api.patch(where, params={"fieldManager": manager}, content=json.dumps(body), headers=headers))
