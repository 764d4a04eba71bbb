"""The few calls to an API server that the command makes, on the sync client, imported when first needed.

Resources are plain JSON: the command shows what a server says, and a typed client would drop what it does not know.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from tuneward_api.names import API_VERSION
from tuneward_cli.errors import CommandError, RefusedError
from tuneward_cli.home import Home

FIELD_MANAGER: Final = "tuneward-cli"
_TIMEOUT: Final = 30.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Where a kind's objects are."""

    api_version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        root = "/api/v1" if self.api_version == "v1" else f"/apis/{self.api_version}"
        middle = f"/namespaces/{namespace}" if self.namespaced else ""
        return "/".join(part for part in (f"{root}{middle}/{self.plural}", name, sub) if part)


JOBS: Final = Kind(API_VERSION, "finetunejobs")
MODELS: Final = Kind(API_VERSION, "finetunedmodels")
SERVERS: Final = Kind(API_VERSION, "modelservers")
PODS: Final = Kind("v1", "pods")
CLAIMS: Final = Kind("v1", "persistentvolumeclaims")
BATCH_JOBS: Final = Kind("batch/v1", "jobs")
CONFIG_MAPS: Final = Kind("v1", "configmaps")


@dataclass
class Kube:
    """One API server, one namespace."""

    client: Any
    namespace: str
    kubeconfig: str
    _kinds: dict[tuple[str, str], Kind] = field(default_factory=dict)

    @classmethod
    def connect(cls, kubeconfig: str | Path | None = None, namespace: str | None = None, home: Home | None = None) -> Kube:
        """--kubeconfig, else $KUBECONFIG, else the local cluster, else the user's own."""
        from kubernetes import config
        from kubernetes.config import ConfigException

        chosen = str(kubeconfig or _found_kubeconfig(home or Home.at()))
        try:
            client = config.new_client_from_config(config_file=chosen)
            _, context = config.list_kube_config_contexts(config_file=chosen)
        except (ConfigException, OSError) as error:
            raise CommandError(f"no cluster: {chosen} cannot be used ({error})", paste="tuneward up") from error
        client.configuration.retries = False
        chosen_namespace = namespace or context.get("context", {}).get("namespace") or "default"
        return cls(client, chosen_namespace, chosen)

    @property
    def host(self) -> str:
        return str(self.client.configuration.host)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        """The answer as JSON. Raises RefusedError for an HTTP error and CommandError when nobody answers."""
        with self._response(method, path, body, query=query, content_type=content_type) as response:
            answer: Json = json.loads(response.data)
            return answer

    def lines(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[str]:
        """A log, line by line, for as long as the server sends it."""
        with self._response("GET", path, query=query, timeout=None) as response:
            rest = b""
            for chunk in response.stream(65536):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            if rest:
                yield rest.decode(errors="replace")

    def _response(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout: float | None = _TIMEOUT,
    ) -> Any:
        import urllib3

        headers = {"Accept": "application/json, */*", "Content-Type": content_type}
        self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = self.client.rest_client.pool_manager.request(
                method,
                url,
                headers=headers,
                body=None if body is None else json.dumps(body),
                preload_content=False,
                timeout=urllib3.Timeout(connect=_TIMEOUT, read=timeout),
            )
        except urllib3.exceptions.HTTPError as error:
            raise CommandError(f"no API server answers at {self.host}", paste="tuneward status") from error
        if response.status >= 400:
            raise RefusedError(response.status, _status_message(response.data))
        return response

    def get(self, kind: Kind, name: str) -> Json | None:
        """The object, or None when it is not there."""
        try:
            return self.call("GET", kind.path(self.namespace, name))
        except RefusedError as refused:
            if refused.code == 404:
                return None
            raise

    def list(self, kind: Kind, selector: str = "") -> list[Json]:
        """All objects with these labels; none when the kind itself is not there."""
        query = {"labelSelector": selector} if selector else None
        try:
            items: list[Json] = self.call("GET", kind.path(self.namespace), query=query)["items"] or []
        except RefusedError as refused:
            if refused.code == 404:
                return []
            raise
        return items

    def create(self, kind: Kind, document: Json) -> Json | None:
        """The new object, or None when one of that name is there."""
        try:
            return self.call("POST", kind.path(self.namespace), document)
        except RefusedError as refused:
            if refused.code == 409:
                return None
            raise

    def apply(self, document: Json) -> Json:
        """Server-side apply: as `kubectl apply --server-side`, with unknown fields refused."""
        kind = self.kind_of(document)
        namespace = document["metadata"].get("namespace") or self.namespace
        return self.call(
            "PATCH",
            kind.path(namespace, document["metadata"]["name"]),
            document,
            query={"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"},
            content_type="application/apply-patch+yaml",
        )

    def kind_of(self, document: Json) -> Kind:
        """Asks the server for the plural of a document's kind."""
        key = (str(document["apiVersion"]), str(document["kind"]))
        if key not in self._kinds:
            root = "/api/v1" if key[0] == "v1" else f"/apis/{key[0]}"
            for item in self.call("GET", root)["resources"]:
                if "/" not in item["name"]:
                    self._kinds[(key[0], item["kind"])] = Kind(key[0], item["name"], bool(item["namespaced"]))
        if key not in self._kinds:
            raise CommandError(f"this cluster knows no {key[1]} of {key[0]}", paste="tuneward up")
        return self._kinds[key]

    def delete(self, kind: Kind, name: str, *, gone_within: float | None = None) -> bool:
        """Whether there was one. With `gone_within`, waits until it is gone; its children follow."""
        try:
            self.call("DELETE", kind.path(self.namespace, name), query={"propagationPolicy": "Background"})
        except RefusedError as refused:
            if refused.code == 404:
                return False
            raise
        deadline = time.monotonic() + (gone_within or 0)
        while gone_within and self.get(kind, name) is not None:
            if time.monotonic() > deadline:
                raise CommandError(f"{kind.plural}/{name} is still there {gone_within:.0f} s after its deletion")
            time.sleep(0.2)
        return True

    def await_none(self, kinds: Sequence[Kind], selector: str, *, within: float) -> None:
        """Until the garbage collector has taken the last object with these labels."""
        deadline = time.monotonic() + within
        while left := [item for kind in kinds for item in self.list(kind, selector)]:
            if time.monotonic() > deadline:
                names = ", ".join(item["metadata"]["name"] for item in left[:5])
                raise CommandError(
                    f"still there {within:.0f} s after the deletion: {names}", paste=f"kubectl get all -l {selector}"
                )
            time.sleep(0.3)

    def core(self) -> Any:
        """The generated client, for exec and port-forward, which are websockets."""
        from kubernetes import client

        return client.CoreV1Api(self.client)


def _found_kubeconfig(home: Home) -> str:
    if named := os.environ.get("KUBECONFIG"):
        return named
    if home.kubeconfig.is_file():
        return str(home.kubeconfig)
    own = Path("~/.kube/config").expanduser()
    if own.is_file():
        return str(own)
    raise CommandError("no cluster: KUBECONFIG is not set and no local cluster was started", paste="tuneward up")


def _status_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
