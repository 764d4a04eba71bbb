"""The only module that talks to the API server.

Requests go through `kubernetes.aio`'s client for its credentials and refresh of tokens, but as plain JSON: its typed models
cost 20 times the CPU and 100 times the memory of a slim projection.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
import orjson
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from tuneward_api.names import API_VERSION, FIELD_MANAGER, STATUS_FIELD_MANAGER
from tuneward_operator.settings import Settings

Object = dict[str, Any]

REQUEST_TIMEOUT = 30.0
PAGE = 500
APPLY = "application/apply-patch+yaml"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class Resource(NamedTuple):
    """Where a kind lives in the API."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        scope = f"/namespaces/{namespace}" if namespace and self.namespaced else ""
        return "/".join(part for part in (f"{root}{scope}/{self.plural}", name, subresource) if part)


JOBS = Resource("batch/v1", "Job", "jobs")
PODS = Resource("v1", "Pod", "pods")
NODES = Resource("v1", "Node", "nodes", namespaced=False)
CLAIMS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
CONFIGMAPS = Resource("v1", "ConfigMap", "configmaps")
SERVICES = Resource("v1", "Service", "services")
EVENTS = Resource("v1", "Event", "events")
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
NETWORKPOLICIES = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
WORKLOADS = Resource("kueue.x-k8s.io/v1beta1", "Workload", "workloads")
"""Kueue's; in which version a cluster has them, if it has, is asked."""
FINETUNEJOBS = Resource(API_VERSION, "FineTuneJob", "finetunejobs")
FINETUNEDMODELS = Resource(API_VERSION, "FineTunedModel", "finetunedmodels")
MODELSERVERS = Resource(API_VERSION, "ModelServer", "modelservers")
OWN_KINDS = (FINETUNEJOBS, FINETUNEDMODELS, MODELSERVERS)
RESOURCES = {
    resource.kind: resource
    for resource in (JOBS, PODS, CLAIMS, CONFIGMAPS, SERVICES, EVENTS, DEPLOYMENTS, NETWORKPOLICIES, *OWN_KINDS)
}


class ApiError(Exception):
    """An answer of the API server that is no success. `status` 0: no answer at all."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def refused(self) -> bool:
        """Whether the same request would be refused again, however often it is sent: the object itself is wrong."""
        return self.status in (400, 422) or (self.status == 403 and "forbidden: " in self.message)


class Throttle:
    """A token bucket, so that a restart with 10,000 jobs leaves the API server some air."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = rate * 1.5
        self._tokens = self._burst
        self._last = time.monotonic()

    async def take(self) -> None:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        self._tokens -= 1.0
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._rate)


async def load_configuration(settings: Settings) -> Any:
    """`kubernetes.aio`'s Configuration from the settings' kubeconfig, the service account, or the user's kubeconfig."""
    configuration = kubernetes_client.Configuration()
    if settings.kubeconfig:
        await kubernetes_config.load_kube_config(config_file=settings.kubeconfig, client_configuration=configuration)
    elif "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    # A proxy for the internet is none for the API server; a kubeconfig's proxy-url still counts.
    configuration.client_session_kwargs = {"trust_env": False}
    # Retries are ours: the queue's, by key.
    configuration.retries = None
    return configuration


class Kube:
    """Requests as plain dicts. Every method raises ApiError; `status` 404 and 409 are told apart by their callers."""

    def __init__(self, configuration: Any, settings: Settings) -> None:
        self._client = kubernetes_client.ApiClient(configuration)
        self._client.user_agent = "tuneward-operator"
        self._throttle = Throttle(settings.requests_per_second)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """A live read; None where there is none."""
        try:
            return await self._json("GET", resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def served(self, resource: Resource) -> Resource | None:
        """In the version that the API server prefers of its group; None: it has no such group."""
        try:
            group = await self._json("GET", f"/apis/{resource.api_version.split('/')[0]}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return resource._replace(api_version=group["preferredVersion"]["groupVersion"])

    async def create(self, body: Object) -> tuple[Object | None, bool]:
        """POST once. (object, True), or (what is there, False) where the name is taken; (None, False): taken, then gone."""
        resource = RESOURCES[body["kind"]]
        namespace = body["metadata"]["namespace"]
        try:
            query = [("fieldManager", FIELD_MANAGER)]
            return await self._json("POST", resource.path(namespace), query=query, body=body), True
        except ApiError as error:
            if error.status != 409:
                raise
        return await self.get(resource, namespace, body["metadata"]["name"]), False

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str | None = None) -> bool:
        """In the background: dependants follow. False where it, or that `uid` of it, is gone."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            await self._json("DELETE", resource.path(namespace, name), body=body)
        except ApiError as error:
            if error.status in (404, 409):
                return False
            raise
        return True

    async def apply(self, body: Object) -> Object:
        """Server-side apply, for what converges only; never a Job."""
        resource = RESOURCES[body["kind"]]
        path = resource.path(body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._apply(path, FIELD_MANAGER, body)

    async def label(self, resource: Resource, namespace: str, name: str, labels: dict[str, str | None]) -> Object | None:
        """Sets labels, or with None takes them away; None where the object is gone."""
        body = {"metadata": {"labels": labels}}
        try:
            query = [("fieldManager", FIELD_MANAGER)]
            path = resource.path(namespace, name)
            return await self._json("PATCH", path, query=query, body=body, content_type="application/merge-patch+json")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def apply_status(self, resource: Resource, namespace: str, name: str, uid: str, status: Object) -> Object:
        """The whole status, ours alone. 404 and 409: gone, or another object of the same name."""
        body = {
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"namespace": namespace, "name": name, "uid": uid},
            "status": status,
        }
        return await self._apply(resource.path(namespace, name, "status"), STATUS_FIELD_MANAGER, body)

    async def pages(self, resource: Resource, namespace: str | None, selector: str = "") -> AsyncIterator[Object]:
        """Every page of a list, whole objects."""
        async for page in self._pages(resource, namespace, selector, accept="application/json"):
            yield page

    async def metadata_pages(self, resource: Resource, namespace: str | None) -> AsyncIterator[Object]:
        """Every page of a list, metadata only: cheap for both sides."""
        async for page in self._pages(resource, namespace, "", accept=METADATA_ONLY):
            yield page

    async def watch(
        self, resource: Resource, namespace: str | None, selector: str, version: str, *, lasts: int, idle: float
    ) -> AsyncIterator[Object]:
        """Events from `version` on, bookmarks included, for `lasts` seconds. TimeoutError after `idle` silent ones."""
        query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", str(lasts)),
        ]
        if selector:
            query.append(("labelSelector", selector))
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=idle)
        response = await self._send("GET", resource.path(namespace), limits, query=query)
        raw = response.response
        try:
            if raw.status != 200:
                raise _error(raw.status, raw.headers, await raw.read())
            async for line in _lines(raw.content):
                yield orjson.loads(line)
        finally:
            raw.close()

    async def _pages(
        self, resource: Resource, namespace: str | None, selector: str, *, accept: str
    ) -> AsyncIterator[Object]:
        query = [("limit", str(PAGE))]
        if selector:
            query.append(("labelSelector", selector))
        token = ""
        while True:
            more = [("continue", token)] if token else []
            page = await self._json("GET", resource.path(namespace), query=[*query, *more], accept=accept)
            # A list of metadata that holds nothing comes with null, which is nothing to go through.
            yield {**page, "items": page.get("items") or []}
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def _apply(self, path: str, manager: str, body: Object) -> Object:
        query = [("fieldManager", manager), ("force", "true")]
        return await self._json("PATCH", path, query=query, body=body, content_type=APPLY)

    async def _json(self, method: str, path: str, **how: Any) -> Object:
        found: Object = orjson.loads(await self._bytes(method, path, **how))
        return found

    async def _bytes(self, method: str, path: str, *, seconds: float = REQUEST_TIMEOUT, **how: Any) -> bytes:
        try:
            response = await self._send(method, path, aiohttp.ClientTimeout(total=seconds), **how)
            content: bytes = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, type(error).__name__, f"{method} {path}: {error}") from error
        if response.status >= 300:
            raise _error(response.status, response.headers, content)
        return content

    async def _send(
        self,
        method: str,
        path: str,
        limits: aiohttp.ClientTimeout,
        *,
        query: list[tuple[str, str]] | None = None,
        body: Object | None = None,
        accept: str = "application/json",
        content_type: str = "application/json",
    ) -> Any:
        await self._throttle.take()
        headers = {"Accept": accept, "Content-Type": content_type}
        sent = await self._client.param_serialize(
            method,
            path,
            query_params=query or [],
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._client.call_api(*sent, _request_timeout=limits)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length; aiohttp's own readline refuses long ones."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line


def _error(status: int, headers: Mapping[str, str], content: bytes) -> ApiError:
    reason, message, wait = "", content[:300].decode(errors="replace"), 0.0
    with suppress(ValueError, AttributeError):
        found = orjson.loads(content)
        reason, message = found.get("reason", ""), found.get("message", message)
    with suppress(ValueError):
        wait = float(headers.get("Retry-After", "0"))
    return ApiError(status, reason, message, wait)
