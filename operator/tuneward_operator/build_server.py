"""Whole objects of a ModelServer, as the API server gets them. Pure: the same inputs give the same object.

The fetch Job and its request are created once. Deployment, Service and the list of wanted adapters converge by
server-side apply; the list is no part of the pod's template, since a new adapter must restart nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tuneward_api.files import FetchRequest, WantedAdapters, canonical_json
from tuneward_api.modelserver import ModelServerSpec
from tuneward_api.names import (
    AGENT_PORT,
    ANNOTATION_WANTED,
    API_VERSION,
    DEFAULT_DIRS,
    DEFAULT_STORE_CLAIM,
    ENGINE_PORT,
    ENV_ADAPTERS_DIR,
    ENV_CLAIMS_DIR,
    ENV_MODEL_DIR,
    ENV_POD_IP,
    ENV_STORE_DIR,
    LABEL_MANAGED_BY,
    LABEL_ROLE,
    LABEL_SERVER,
    LABEL_SERVER_UID,
    REQUEST_FILE,
    WANTED_FILE,
    hashed,
)
from tuneward_api.uris import parse_uri
from tuneward_api.workers import Resources
from tuneward_operator.build_pod import DOCUMENTS, POD_ANNOTATIONS, Mounts, beside, container, field_env, pod_spec
from tuneward_operator.kube import Object
from tuneward_operator.settings import Settings

FETCH: Final = "fetch"
SERVER: Final = "server"
ADAPTERS_FOLDER: Final = "adapters"
"""Below the store's root."""

_AGENT_RESOURCES: Final = {
    "requests": {"cpu": "50m", "memory": "128Mi"},
    "limits": {"cpu": "1", "memory": "512Mi"},
}
_ENGINE_DEFAULTS: Final = {"cpu": ("1", "4"), "memory": ("2Gi", "8Gi")}
"""Request and limit of an engine that names neither."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The ModelServer that the objects are made for."""

    namespace: str
    name: str
    uid: str
    spec: ModelServerSpec
    held: tuple[str, ...] = ()
    """Its claims that one node at a time can mount (ReadWriteOnce), the store first."""

    @property
    def store_claim(self) -> str:
        store = self.spec.store
        return (store.claim_name if store else None) or DEFAULT_STORE_CLAIM

    @property
    def replicas(self) -> int:
        return 1 if self.spec.replicas is None else self.spec.replicas

    @property
    def max_adapters(self) -> int:
        return self.spec.max_adapters or 16

    @property
    def max_rank(self) -> int:
        return self.spec.max_rank or 64

    @property
    def base_name(self) -> str:
        """What clients call the base model: the last part of its address, without the revision."""
        return parse_uri(self.spec.model.uri).path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def address(self) -> str:
        return f"http://{self.name}.{self.namespace}.svc:{ENGINE_PORT}/v1"


@dataclass(frozen=True, kw_only=True)
class BasePlace:
    """Where the base model lies: the folder `path` below the root of `claim`."""

    claim: str
    path: str


def fetch_name(server: str) -> str:
    """Job and ConfigMap. Not `-request`: a job of the same name has a ConfigMap of that name."""
    return hashed(f"{server}-fetch")


def adapters_name(server: str) -> str:
    return hashed(f"{server}-adapters")


def fetch_configmap(server: Server) -> Object:
    request = FetchRequest(uri=server.spec.model.uri, store_claim=server.store_claim)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(server, fetch_name(server.name), FETCH),
        "immutable": True,
        "data": {"request.json": canonical_json(request.to_json())},
    }


def fetch_job(server: Server, settings: Settings) -> Object:
    """Brings the base model into the store. The only pod of a server that sees the model's Secret."""
    mounts = Mounts()
    mounts.configmap(fetch_name(server.name), DOCUMENTS)
    mounts.claim(server.store_claim, DEFAULT_DIRS[ENV_STORE_DIR])
    source = parse_uri(server.spec.model.uri)
    if source.scheme == "pvc" and source.authority != server.store_claim:
        mounts.claim(source.authority, f"{DEFAULT_DIRS[ENV_CLAIMS_DIR]}/{source.authority}", read_only=True)
    secret = server.spec.model.secret_ref
    env = [] if secret is None else [_secret_env("HF_TOKEN", secret.name)]
    command = ["python", "-m", "tuneward_trainer", "fetch", "--request", REQUEST_FILE]
    resources = {
        "requests": {"cpu": settings.helper_cpu, "memory": settings.helper_memory},
        "limits": {"cpu": settings.helper_cpu_limit, "memory": settings.helper_memory_limit},
    }
    spec = pod_spec(container(FETCH, settings.image_trainer, command, env, resources, mounts), mounts, settings)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(server, fetch_name(server.name), FETCH),
        "spec": {"backoffLimit": 0, "template": _template(server, FETCH, spec)},
    }


def deployment(server: Server, base: BasePlace, settings: Settings) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(server, server.name, SERVER),
        "spec": {
            "replicas": server.replicas,
            "selector": {"matchLabels": _selector(server)},
            "template": _template(server, SERVER, _server_pod(server, base, settings)),
        },
    }


def service(server: Server) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(server, server.name, SERVER),
        "spec": {
            "selector": _selector(server),
            "ports": [{"name": "http", "port": ENGINE_PORT, "targetPort": ENGINE_PORT, "protocol": "TCP"}],
        },
    }


def adapters_configmap(server: Server, wanted: WantedAdapters) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(server, adapters_name(server.name), SERVER),
        "data": {"adapters.json": canonical_json(wanted.to_json())},
    }


def pod_bump(namespace: str, pod: str, uid: str, digest: str) -> Object:
    """Applied to a living pod: a change of the pod makes its kubelet mount the ConfigMap anew at once, where a change of
    the ConfigMap alone waits for up to 90 s. The uid keeps an apply from creating a pod that has just gone."""
    metadata = {"namespace": namespace, "name": pod, "uid": uid, "annotations": {ANNOTATION_WANTED: digest}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}


def _server_pod(server: Server, base: BasePlace, settings: Settings) -> Object:
    """Engine and agent see the same folders, so that the path that the agent names is the one that the engine opens."""
    mounts = Mounts()
    mounts.claim(base.claim, DEFAULT_DIRS[ENV_MODEL_DIR], read_only=True, sub_path=base.path)
    mounts.claim(server.store_claim, DEFAULT_DIRS[ENV_ADAPTERS_DIR], read_only=True, sub_path=ADAPTERS_FOLDER)
    mounts.configmap(adapters_name(server.name), WANTED_FILE.rsplit("/", 1)[0])
    env = [field_env(ENV_POD_IP, "status.podIP")]
    if server.spec.api_key_secret_ref is not None:
        env.append(_secret_env("TUNEWARD_API_KEY", server.spec.api_key_secret_ref.name))
    spec = pod_spec(_engine(server, settings, env, mounts), mounts, settings)
    spec["containers"].append(_agent(server, settings, env, mounts))
    spec["restartPolicy"] = "Always"
    if server.spec.node_selector:
        spec["nodeSelector"] = dict(server.spec.node_selector)
    if server.spec.tolerations:
        spec["tolerations"] = [toleration.to_json() for toleration in server.spec.tolerations]
    return spec


def _engine(server: Server, settings: Settings, env: list[Object], mounts: Mounts) -> Object:
    command = ["python", "-m", "tuneward_serving", "engine", "--port", str(ENGINE_PORT)]
    command += [*_limits(server), "--served-base-name", server.base_name]
    main = container("engine", settings.image_server, command, env, _engine_resources(server), mounts)
    main["ports"] = [{"name": "http", "containerPort": ENGINE_PORT, "protocol": "TCP"}]
    main["readinessProbe"] = _probe("/health", ENGINE_PORT, period=2, failures=2)
    # Half an hour for the weights of a large model; then the kubelet tries again.
    main["startupProbe"] = _probe("/health", ENGINE_PORT, period=2, failures=900)
    return main


def _agent(server: Server, settings: Settings, env: list[Object], mounts: Mounts) -> Object:
    command = ["python", "-m", "tuneward_serving", "agent", "--port", str(AGENT_PORT), *_limits(server)]
    agent = container("agent", settings.image_server, command, env, _AGENT_RESOURCES, mounts)
    agent["ports"] = [{"name": "agent", "containerPort": AGENT_PORT, "protocol": "TCP"}]
    agent["readinessProbe"] = _probe("/readyz", AGENT_PORT, period=2, failures=2)
    agent["livenessProbe"] = _probe("/healthz", AGENT_PORT, period=30, failures=3)
    return agent


def _limits(server: Server) -> list[str]:
    return ["--max-adapters", str(server.max_adapters), "--max-rank", str(server.max_rank)]


def _probe(path: str, port: int, *, period: int, failures: int) -> Object:
    """A second is too short for a node that is busy."""
    get = {"path": path, "port": port, "scheme": "HTTP"}
    return {"httpGet": get, "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures}


def _engine_resources(server: Server) -> Object:
    """Requests and limits for all, since namespaces with a quota refuse pods without; what was asked for goes first."""
    asked = server.spec.resources or Resources()
    requests, limits = dict(asked.requests or {}), dict(asked.limits or {})
    for key, (request, limit) in _ENGINE_DEFAULTS.items():
        if key in limits:
            requests.setdefault(key, limits[key])
        elif key in requests:
            limits[key] = requests[key]
        else:
            requests[key], limits[key] = request, limit
    return {"requests": requests, "limits": limits}


def _secret_env(variable: str, secret: str) -> Object:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": "token"}}}


def _labels(server: Server, role: str) -> dict[str, str]:
    return {
        LABEL_MANAGED_BY: "tuneward",
        LABEL_SERVER: server.name,
        LABEL_SERVER_UID: server.uid,
        LABEL_ROLE: role,
    }


def _selector(server: Server) -> dict[str, str]:
    return {LABEL_SERVER_UID: server.uid, LABEL_ROLE: SERVER}


def _metadata(server: Server, name: str, role: str) -> Object:
    owner = {"apiVersion": API_VERSION, "kind": "ModelServer", "name": server.name, "uid": server.uid, "controller": True}
    return {
        "namespace": server.namespace,
        "name": name,
        "labels": _labels(server, role),
        "ownerReferences": [owner],
    }


def _template(server: Server, role: str, spec: Object) -> Object:
    template: Object = {
        "metadata": {"labels": _labels(server, role), "annotations": dict(POD_ANNOTATIONS)},
        "spec": spec,
    }
    return beside(template, server.held)
