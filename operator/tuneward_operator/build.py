"""Whole objects of a FineTuneJob, as the API server gets them. Pure: the same inputs give the same object.

Each is created once and then only read or deleted: a second apply of a Job is refused, takes Kueue's admission away, or
starts a finished one again. So what a running job runs was fixed when it was accepted, whatever version reads it later.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from tuneward_api.files import FinishedAdapter, Images, JobRef, Parent, Plan, Request, canonical_json
from tuneward_api.finetunejob import FineTuneJobSpec
from tuneward_api.names import (
    API_VERSION,
    DEFAULT_DIRS,
    DEFAULT_STORE_CLAIM,
    ENV_CLAIMS_DIR,
    ENV_CONFIGMAPS_DIR,
    ENV_DATA_DIR,
    ENV_MODEL_DIR,
    ENV_NODE_NAME,
    ENV_POD_IP,
    ENV_POD_NAME,
    ENV_POD_UID,
    ENV_RUN_DIR,
    ENV_STORE_DIR,
    GRACE_PERIOD_SECONDS,
    LABEL_JOB,
    LABEL_JOB_UID,
    LABEL_LAUNCH,
    LABEL_MANAGED_BY,
    LABEL_ROLE,
    LABEL_SERVER,
    PLAN_FILE,
    REQUEST_FILE,
    TRAINER_PORT,
    hashed,
    run_directory,
)
from tuneward_api.names import model_name as name_of_model
from tuneward_api.trackers import SECRET_KEYS
from tuneward_api.uris import parse_uri
from tuneward_api.workers import Resources
from tuneward_operator.build_pod import DOCUMENTS, POD_ANNOTATIONS, Mounts, beside, container, field_env, pod_spec
from tuneward_operator.kube import Object
from tuneward_operator.settings import Settings

PREPARE, ATTEMPT, FINISH = "prepare", "attempt", "finish"
KUEUE = "kueue.x-k8s.io/"
QUEUE_LABEL = f"{KUEUE}queue-name"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The FineTuneJob that the objects are made for."""

    namespace: str
    name: str
    uid: str
    spec: FineTuneJobSpec
    labels: dict[str, str]
    annotations: dict[str, str]
    held: tuple[str, ...] = ()
    """Its claims that one node at a time can mount (ReadWriteOnce), the store first, then the base model's."""
    gang_held: str = ""
    """The first of them that its workers mount; empty: none."""

    @property
    def queue(self) -> str | None:
        return self.labels.get(QUEUE_LABEL)

    @property
    def store_claim(self) -> str:
        store = self.spec.store
        return (store.claim_name if store else None) or DEFAULT_STORE_CLAIM

    @property
    def replicas(self) -> int:
        return (self.spec.workers.replicas if self.spec.workers else None) or 1

    @property
    def gpus(self) -> int:
        asked = self.spec.workers.gpus_per_worker if self.spec.workers else None
        return 1 if asked is None else asked


class StoreUser(Protocol):
    """A job or a server."""

    @property
    def namespace(self) -> str: ...
    @property
    def store_claim(self) -> str: ...


def attempt_name(job: str, launch: int) -> str:
    return hashed(f"{job}-a{launch}")


def helper_name(job: str, role: str) -> str:
    return hashed(f"{job}-{role}")


def gang_name(job: str) -> str:
    return hashed(f"{job}-gang")


def document_name(job: str, document: str) -> str:
    """ConfigMap of the request or the plan."""
    return hashed(f"{job}-{document}")


def master_port(uid: str) -> int:
    """Differs between jobs, since pods may share a network (hostNetwork, one machine)."""
    return 20000 + int(hashlib.sha256(uid.encode()).hexdigest(), 16) % 10000


def request_of(owner: Owner, settings: Settings, parent: Parent | None = None) -> Request:
    """What prepare reads; pins the images, and the model that the job goes on from."""
    return Request(
        job=JobRef(namespace=owner.namespace, name=owner.name, uid=owner.uid),
        spec=owner.spec,
        images=Images(trainer=settings.image_trainer),
        store_claim=owner.store_claim,
        run_directory=run_directory(owner.name, owner.uid),
        parent=parent,
    )


def store_claim(owner: StoreUser, settings: Settings) -> Object:
    """The namespace's store. Nobody owns it: models and adapters outlive every job."""
    spec: Object = {
        "accessModes": [settings.storage_access_mode],
        "resources": {"requests": {"storage": settings.storage_size}},
    }
    if settings.storage_class:
        spec["storageClassName"] = settings.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "namespace": owner.namespace,
            "name": owner.store_claim,
            "labels": {LABEL_MANAGED_BY: "tuneward"},
        },
        "spec": spec,
    }


def request_configmap(owner: Owner, request: Request) -> Object:
    return _document(owner, "request", canonical_json(request.to_json()))


def plan_configmap(owner: Owner, plan: Plan) -> Object:
    return _document(owner, "plan", canonical_json(plan.to_json()))


def gang_service(owner: Owner) -> Object:
    """Gives workers stable names. Not ready is published: workers find each other before any of them is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(owner, gang_name(owner.name), ATTEMPT),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_JOB_UID: owner.uid, LABEL_ROLE: ATTEMPT},
            "ports": [{"name": "progress", "port": TRAINER_PORT}],
        },
    }


def gang_policy(owner: Owner, settings: Settings) -> Object:
    """Workers trust whoever reaches their ports: that is each other, and for progress the operator and scrapers. Of what is
    outside they need names alone, or everything where a tracker may be anywhere."""
    gang = {"podSelector": {"matchLabels": {LABEL_JOB_UID: owner.uid, LABEL_ROLE: ATTEMPT}}}
    named = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(settings.network_policy_namespaces)}
    readers = {"namespaceSelector": {"matchExpressions": [named]}}
    names = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    trackers = owner.spec.trackers.asked() if owner.spec.trackers is not None else {}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(owner, gang_name(owner.name), ATTEMPT),
        "spec": {
            **gang,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [gang]}, {"from": [readers], "ports": [{"port": TRAINER_PORT, "protocol": "TCP"}]}],
            "egress": [{}] if trackers else [{"to": [gang]}, {"ports": names}],
        },
    }


def prepare_job(owner: Owner, request: Request, settings: Settings) -> Object:
    """Fetches, checks and tokenizes on a CPU, before any GPU is asked for. The only pod that sees the Secrets of model
    and data."""
    mounts = Mounts()
    mounts.configmap(document_name(owner.name, "request"), DOCUMENTS)
    mounts.claim(request.store_claim, DEFAULT_DIRS[ENV_STORE_DIR])
    for claim in sorted(_sources(request, "pvc") - {request.store_claim}):
        mounts.claim(claim, f"{DEFAULT_DIRS[ENV_CLAIMS_DIR]}/{claim}", read_only=True)
    for name in sorted(_sources(request, "configmap")):
        mounts.configmap(name, f"{DEFAULT_DIRS[ENV_CONFIGMAPS_DIR]}/{name}")
    env = []
    if owner.spec.model.secret_ref is not None:
        source = {"secretKeyRef": {"name": owner.spec.model.secret_ref.name, "key": "token"}}
        env.append({"name": "HF_TOKEN", "valueFrom": source})
    command = ["python", "-m", "tuneward_trainer", "prepare", "--request", REQUEST_FILE]
    main = container(PREPARE, request.images.trainer, command, env, _helper_resources(settings), mounts)
    return _helper_job(owner, PREPARE, main, mounts, settings)


def finish_job(owner: Owner, plan: Plan, settings: Settings) -> Object:
    """Checks and files what the training left. Idempotent."""
    mounts = Mounts()
    mounts.configmap(document_name(owner.name, "plan"), DOCUMENTS)
    mounts.claim(plan.request.store_claim, DEFAULT_DIRS[ENV_STORE_DIR])
    command = ["python", "-m", "tuneward_trainer", "finish", "--plan", PLAN_FILE]
    main = container(FINISH, plan.request.images.trainer, command, [], _helper_resources(settings), mounts)
    return _helper_job(owner, FINISH, main, mounts, settings)


def attempt_job(owner: Owner, plan: Plan, launch: int, settings: Settings) -> Object:
    """The gang. Any failure ends it whole (backoffLimit 0), and no pod is replaced while another still runs."""
    name = attempt_name(owner.name, launch)
    labels = _labels(owner, ATTEMPT) | {LABEL_LAUNCH: str(launch)}
    mounts = Mounts()
    mounts.configmap(document_name(owner.name, "plan"), DOCUMENTS)
    base, request = plan.prepared.base, plan.request
    mounts.claim(base.claim, DEFAULT_DIRS[ENV_MODEL_DIR], read_only=True, sub_path=base.sub_path)
    mounts.claim(request.store_claim, DEFAULT_DIRS[ENV_DATA_DIR], read_only=True, sub_path=plan.prepared.data.sub_path)
    mounts.claim(request.store_claim, DEFAULT_DIRS[ENV_RUN_DIR], sub_path=request.run_directory)
    if owner.gpus > 1:
        mounts.shared_memory()
    command = ["python", "-m", "tuneward_trainer", "train", "--plan", PLAN_FILE]
    env = [*_gang_env(owner, name), *_tracker_env(owner.spec)]
    main = container("trainer", request.images.trainer, command, env, _resources(owner, settings), mounts)
    main["ports"] = [{"name": "progress", "containerPort": TRAINER_PORT}]
    spec = pod_spec(main, mounts, settings) | _where_workers_go(owner.spec)
    spec["subdomain"] = gang_name(owner.name)
    spec["terminationGracePeriodSeconds"] = GRACE_PERIOD_SECONDS
    body = _job(owner, name, labels, spec)
    body["metadata"]["labels"] |= {key: value for key, value in owner.labels.items() if key.startswith(KUEUE)}
    body["metadata"]["annotations"] = {key: value for key, value in owner.annotations.items() if key.startswith(KUEUE)}
    body["spec"] |= {
        "completionMode": "Indexed",
        "completions": owner.replicas,
        "parallelism": owner.replicas,
        "podReplacementPolicy": "Failed",
    }
    if owner.queue:
        # From here on the field is Kueue's alone.
        body["spec"]["suspend"] = True
    return body


def model_name(owner: Owner, digest: str) -> str:
    registered = owner.spec.register_.name if owner.spec.register_ else None
    return name_of_model(registered or owner.name, digest)


def finetuned_model(owner: Owner, plan: Plan, adapter: FinishedAdapter) -> Object:
    """The record. No ownerReference: a job's clean-up never takes a model with it."""
    labels = {LABEL_MANAGED_BY: "tuneward", LABEL_JOB: owner.name, LABEL_JOB_UID: owner.uid}
    if owner.spec.serve is not None:
        labels[LABEL_SERVER] = owner.spec.serve.server
    base = plan.prepared.base
    base_record = {
        "uri": base.uri,
        "digest": base.digest,
        "architecture": base.architecture,
        "chatTemplateDigest": base.chat_template_digest,
    }
    metrics = adapter.metrics.to_json()
    metrics.pop("seconds", None)
    parent = plan.request.parent
    return {
        "apiVersion": API_VERSION,
        "kind": "FineTunedModel",
        "metadata": {
            "namespace": owner.namespace,
            "name": model_name(owner, adapter.digest),
            "labels": labels,
        },
        "spec": {
            "servedName": adapter.served_name,
            "source": {"job": owner.name, "uid": owner.uid, "attempt": adapter.attempt, "step": adapter.step},
            "base": {key: value for key, value in base_record.items() if value is not None},
            **({} if parent is None else {"parent": {"name": parent.name, "digest": parent.artifact_digest}}),
            "artifact": {
                "uri": f"pvc://{plan.request.store_claim}/{adapter.sub_path}",
                "digest": adapter.digest,
                "size": adapter.size,
            },
            **({} if adapter.whole else {"adapter": _shape(adapter)}),
            "metrics": metrics,
            "dataDigest": plan.prepared.data.summary.digest,
        },
    }


def _shape(adapter: FinishedAdapter) -> Object:
    return {
        "type": adapter.type,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "targetModules": adapter.target_modules,
    }


def _labels(owner: Owner, role: str) -> dict[str, str]:
    return {LABEL_MANAGED_BY: "tuneward", LABEL_JOB: owner.name, LABEL_JOB_UID: owner.uid, LABEL_ROLE: role}


def _metadata(owner: Owner, name: str, role: str) -> Object:
    # No blockOwnerDeletion: OpenShift would ask for rights on the owner's finalizers, and nobody waits for us.
    reference = {"apiVersion": API_VERSION, "kind": "FineTuneJob", "name": owner.name, "uid": owner.uid, "controller": True}
    return {
        "namespace": owner.namespace,
        "name": name,
        "labels": _labels(owner, role),
        "ownerReferences": [reference],
    }


def _document(owner: Owner, document: str, text: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(owner, document_name(owner.name, document), document),
        "immutable": True,
        "data": {f"{document}.json": text},
    }


def _job(owner: Owner, name: str, labels: dict[str, str], spec: Object) -> Object:
    metadata = _metadata(owner, name, labels[LABEL_ROLE])
    metadata["labels"] = labels
    template: Object = {"metadata": {"labels": dict(labels), "annotations": dict(POD_ANNOTATIONS)}, "spec": spec}
    template = beside(template, owner.held)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": 0, "template": template},
    }


def _helper_job(owner: Owner, role: str, main: Object, mounts: Mounts, settings: Settings) -> Object:
    spec = pod_spec(main, mounts, settings)
    if owner.gang_held:
        # A volume that binds here must be where the workers can follow.
        spec |= _where_workers_go(owner.spec)
    return _job(owner, helper_name(owner.name, role), _labels(owner, role), spec)


def _where_workers_go(spec: FineTuneJobSpec) -> Object:
    workers = spec.workers
    found: Object = {}
    if workers is not None and workers.node_selector:
        found["nodeSelector"] = dict(workers.node_selector)
    if workers is not None and workers.tolerations:
        found["tolerations"] = [toleration.to_json() for toleration in workers.tolerations]
    return found


def _sources(request: Request, scheme: str) -> set[str]:
    """Claims or ConfigMaps that the model and the data are read from."""
    return {uri.authority for uri in map(parse_uri, request.uris()) if uri.scheme == scheme}


def _gang_env(owner: Owner, name: str) -> list[Object]:
    return [
        {"name": "MASTER_ADDR", "value": f"{name}-0.{gang_name(owner.name)}"},
        {"name": "MASTER_PORT", "value": str(master_port(owner.uid))},
        field_env(ENV_POD_NAME, "metadata.name"),
        field_env(ENV_POD_UID, "metadata.uid"),
        field_env(ENV_POD_IP, "status.podIP"),
        field_env(ENV_NODE_NAME, "spec.nodeName"),
    ]


def _tracker_env(spec: FineTuneJobSpec) -> list[Object]:
    """Keys by reference, so that they are in no object of ours. Optional: a Secret that is missing costs the job its
    tracker and not its training."""
    asked = spec.trackers.asked() if spec.trackers is not None else {}
    return [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": found.secret_ref.name, "key": key, "optional": True}}}
        for name, found in asked.items()
        if found.secret_ref is not None
        for key, variable in SECRET_KEYS[name].items()
    ]


def _helper_resources(settings: Settings) -> Object:
    return {
        "requests": {"cpu": settings.helper_cpu, "memory": settings.helper_memory},
        "limits": {"cpu": settings.helper_cpu_limit, "memory": settings.helper_memory_limit},
    }


def _resources(owner: Owner, settings: Settings) -> Object:
    """Requests and limits for all, since namespaces with a quota refuse pods without; what was asked for goes first."""
    asked = (owner.spec.workers.resources if owner.spec.workers else None) or Resources()
    requests: dict[str, Any] = dict(asked.requests or {})
    limits: dict[str, Any] = dict(asked.limits or {})
    defaults = {
        "cpu": (settings.worker_cpu, settings.worker_cpu_limit),
        "memory": (settings.worker_memory, settings.worker_memory_limit),
    }
    for key, (request, limit) in defaults.items():
        if key in limits:
            # A default request above the limit would be refused; equal is what Kubernetes itself would choose.
            requests.setdefault(key, limits[key])
        elif key in requests:
            limits[key] = requests[key]
        else:
            requests[key], limits[key] = request, limit
    if owner.gpus > 0:
        limits[settings.gpu_resource] = owner.gpus
    return {"requests": requests, "limits": limits}
