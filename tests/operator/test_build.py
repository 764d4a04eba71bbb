"""Builders give whole objects."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.operator.pictures import SETTINGS, UID, finished, owner, plan

from tuneward_api.files import FinishReport, Parent, Plan, Request
from tuneward_api.finetunedmodel import FineTunedModelSpec
from tuneward_api.names import MAX_JOB_NAME
from tuneward_operator import build
from tuneward_operator.settings import Settings
from tuneward_operator.status import resolved_of

OWNED = {
    "apiVersion": "tuneward.dev/v1alpha1",
    "kind": "FineTuneJob",
    "name": "bot",
    "uid": UID,
    "controller": True,
}


def labels(role: str, **more: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "tuneward",
        "tuneward.dev/job": "bot",
        "tuneward.dev/job-uid": UID,
        "tuneward.dev/role": role,
        **more,
    }


def metadata(name: str, role: str, **more: str) -> dict[str, Any]:
    return {"namespace": "team", "name": name, "labels": labels(role, **more), "ownerReferences": [OWNED]}


SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
HOME = [
    {"name": "HOME", "value": "/mnt/tmp"},
    {"name": "USER", "value": "tuneward"},
    {"name": "TMPDIR", "value": "/mnt/tmp"},
]
ANNOTATIONS = {
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
CONTAINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def test_the_attempt_job_is_whole() -> None:
    of = owner(workers={"replicas": 2, "gpusPerWorker": 0, "nodeSelector": {"zone": "a"}, "tolerations": [{"key": "gpu"}]})
    assert build.attempt_job(of, plan(of), 3, SETTINGS) == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata("bot-a3", "attempt", **{"tuneward.dev/launch": "3"}) | {"annotations": {}},
        "spec": {
            "backoffLimit": 0,
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {"labels": labels("attempt", **{"tuneward.dev/launch": "3"}), "annotations": ANNOTATIONS},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "subdomain": "bot-gang",
                    "terminationGracePeriodSeconds": 120,
                    "nodeSelector": {"zone": "a"},
                    "tolerations": [{"key": "gpu"}],
                    "securityContext": SECURITY,
                    "containers": [
                        {
                            "name": "trainer",
                            "image": "trainer:1",
                            "command": ["python", "-m", "tuneward_trainer", "train", "--plan", "/etc/tuneward/plan.json"],
                            "env": [
                                *HOME,
                                {"name": "MASTER_ADDR", "value": "bot-a3-0.bot-gang"},
                                {"name": "MASTER_PORT", "value": str(build.master_port(UID))},
                                {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                                {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                                {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                            ],
                            "ports": [{"name": "progress", "containerPort": 8787}],
                            "resources": {
                                "requests": {"cpu": "2", "memory": "4Gi"},
                                "limits": {"cpu": "8", "memory": "16Gi"},
                            },
                            "securityContext": CONTAINED,
                            "volumeMounts": [
                                {"name": "tmp", "mountPath": "/mnt/tmp"},
                                {"name": "configmap-1", "mountPath": "/etc/tuneward", "readOnly": True},
                                {"name": "claim-0", "mountPath": "/mnt/model", "readOnly": True, "subPath": "imports/tiny"},
                                {"name": "claim-0", "mountPath": "/mnt/data", "readOnly": True, "subPath": "data/d1"},
                                {"name": "claim-0", "mountPath": "/mnt/run", "subPath": "jobs/bot-0c0ffee0"},
                            ],
                        }
                    ],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {}},
                        {"name": "configmap-1", "configMap": {"name": "bot-plan"}},
                        {"name": "claim-0", "persistentVolumeClaim": {"claimName": "tuneward-store"}},
                    ],
                },
            },
        },
    }


def pod(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


def test_a_queued_attempt_is_created_suspended_with_the_queues_words() -> None:
    of = owner(
        labels={"kueue.x-k8s.io/queue-name": "gpus", "team": "a"},
        annotations={"kueue.x-k8s.io/priority": "1", "note": "x"},
    )
    job = build.attempt_job(of, plan(of), 1, SETTINGS)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert "team" not in job["metadata"]["labels"]
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/priority": "1"}


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"requests": {"cpu": "1"}}, ({"cpu": "1", "memory": "4Gi"}, {"cpu": "1", "memory": "16Gi"})),
        ({"limits": {"memory": "1Gi"}}, ({"memory": "1Gi", "cpu": "2"}, {"memory": "1Gi", "cpu": "8"})),
        (
            {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            ({"cpu": 1, "memory": "1Gi"}, {"cpu": 1, "memory": "2Gi"}),
        ),
    ],
)
def test_every_container_has_requests_and_limits(asked: dict[str, Any], given: tuple[dict[str, Any], ...]) -> None:
    of = owner(workers={"gpusPerWorker": 0, "resources": asked})
    resources = pod(build.attempt_job(of, plan(of), 1, SETTINGS))["containers"][0]["resources"]
    assert (resources["requests"], resources["limits"]) == given


def test_gpus_are_limits_of_the_clusters_resource_and_one_is_the_default() -> None:
    of = owner(workers={"gpusPerWorker": 4})
    found = pod(build.attempt_job(of, plan(of), 1, Settings(gpu_resource="amd.com/gpu")))
    assert found["containers"][0]["resources"]["limits"]["amd.com/gpu"] == 4
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in found["volumes"]
    of = owner(workers={})
    limits = pod(build.attempt_job(of, plan(of), 1, SETTINGS))["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1


def test_user_and_group_can_be_left_to_the_cluster() -> None:
    of = owner()
    found = pod(build.attempt_job(of, plan(of), 1, Settings(run_as_user=-1, fs_group=-1)))
    assert found["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_prepare_alone_sees_secrets_other_claims_and_configmaps() -> None:
    of = owner(
        model={"uri": "hf://org/name", "secretRef": {"name": "hf"}},
        datasets={
            "training": [{"uri": "configmap://chats/a.jsonl"}, {"uri": "pvc://lake/x.jsonl"}],
            "validation": [{"uri": "pvc://tuneward-store/v.jsonl"}],
        },
    )
    request = build.request_of(of, SETTINGS)
    found = pod(build.prepare_job(of, request, SETTINGS))
    main = found["containers"][0]
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert token in main["env"]
    assert [(mount["mountPath"], mount.get("readOnly", False)) for mount in main["volumeMounts"]] == [
        ("/mnt/tmp", False),
        ("/etc/tuneward", True),
        ("/mnt/store", False),
        ("/mnt/claims/lake", True),
        ("/mnt/configmaps/chats", True),
    ]
    assert main["command"][-2:] == ["--request", "/etc/tuneward/request.json"]
    for later in (build.attempt_job(of, plan(of), 1, SETTINGS), build.finish_job(of, plan(of), SETTINGS)):
        assert "HF_TOKEN" not in json.dumps(later)
        assert "lake" not in json.dumps(later)


def test_keys_of_trackers_reach_the_training_pods_as_references_alone() -> None:
    trackers = {
        "wandb": {"project": "support", "secretRef": {"name": "keys"}},
        "mlflow": {"trackingUri": "https://mlflow.acme.com"},
        "trackio": {"secretRef": {"name": "hub"}},
    }
    of = owner(trackers=trackers)
    plain = pod(build.attempt_job(owner(), plan(owner()), 1, SETTINGS))["containers"][0]["env"]
    env = pod(build.attempt_job(of, plan(of), 1, SETTINGS))["containers"][0]["env"]
    assert env == [
        *plain,
        {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY", "optional": True}},
        },
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}}},
    ]
    for helper in (
        build.prepare_job(of, build.request_of(of, SETTINGS), SETTINGS),
        build.finish_job(of, plan(of), SETTINGS),
    ):
        assert "secretKeyRef" not in json.dumps(helper)


ELDER = Parent(
    name="elder",
    base_uri="pvc://models/tiny",
    base_digest="sha256:" + "b" * 64,
    artifact_uri="pvc://old-store/adapters/sha256-a",
    artifact_digest="sha256:" + "a" * 64,
)


def test_prepare_reads_the_parent_and_its_base_where_they_lie() -> None:
    of = owner(model={"uri": "model://elder"})
    request = build.request_of(of, SETTINGS, ELDER)
    assert (request.parent, request.base_uri) == (ELDER, "pvc://models/tiny")
    mounts = pod(build.prepare_job(of, request, SETTINGS))["containers"][0]["volumeMounts"]
    assert [mount["mountPath"] for mount in mounts if "/claims/" in mount["mountPath"]] == [
        "/mnt/claims/models",
        "/mnt/claims/old-store",
    ]


def test_the_model_names_its_parent() -> None:
    of = owner(model={"uri": "model://elder"})
    report = finished().report
    assert isinstance(report, FinishReport)
    assert report.adapter is not None
    whole = plan(of).model_copy(update={"request": build.request_of(of, SETTINGS, ELDER)})
    body = build.finetuned_model(of, whole, report.adapter)
    assert body["spec"]["parent"] == {"name": "elder", "digest": ELDER.artifact_digest}
    assert FineTunedModelSpec.model_validate(body["spec"]).parent == resolved_of(whole).parent


def test_request_and_plan_are_immutable_documents() -> None:
    of = owner()
    request = build.request_of(of, SETTINGS)
    body = build.request_configmap(of, request)
    assert body["immutable"] is True
    assert body["metadata"] == metadata("bot-request", "request")
    assert Request.model_validate_json(body["data"]["request.json"]) == request
    body = build.plan_configmap(of, plan(of))
    assert Plan.model_validate_json(body["data"]["plan.json"]) == plan(of)


def test_the_service_names_workers_before_they_are_ready() -> None:
    assert build.gang_service(owner()) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata("bot-gang", "attempt"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"tuneward.dev/job-uid": UID, "tuneward.dev/role": "attempt"},
            "ports": [{"name": "progress", "port": 8787}],
        },
    }


GANG = {"podSelector": {"matchLabels": {"tuneward.dev/job-uid": UID, "tuneward.dev/role": "attempt"}}}
POLICED = Settings(network_policy_namespaces=("tuneward-system", "monitoring"))


def test_the_gangs_policy_lets_in_the_gang_and_those_who_read_progress() -> None:
    readers = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["tuneward-system", "monitoring"]}
    assert build.gang_policy(owner(), POLICED) == {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata("bot-gang", "attempt"),
        "spec": {
            **GANG,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [GANG]},
                {
                    "from": [{"namespaceSelector": {"matchExpressions": [readers]}}],
                    "ports": [{"port": 8787, "protocol": "TCP"}],
                },
            ],
            "egress": [{"to": [GANG]}, {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}],
        },
    }
    tracked = owner(trackers={"mlflow": {"trackingUri": "http://mlflow.ml:5000"}})
    assert build.gang_policy(tracked, POLICED)["spec"]["egress"] == [{}]


def test_the_store_has_no_owner() -> None:
    body = build.store_claim(
        owner(), Settings(storage_class="fast", storage_size="5Gi", storage_access_mode="ReadWriteOnce")
    )
    assert "ownerReferences" not in body["metadata"]
    assert body["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    }


def test_the_model_is_named_by_its_digest_and_fits_its_own_schema() -> None:
    of = owner(register={"name": "support"}, serve={"server": "assistant"})
    report = finished().report
    assert isinstance(report, FinishReport)
    assert report.adapter is not None
    adapter = report.adapter
    body = build.finetuned_model(of, plan(of), adapter)
    assert body["metadata"]["name"] == "support-abababab"
    assert body["metadata"]["labels"]["tuneward.dev/server"] == "assistant"
    assert body["spec"]["source"] == {"job": of.name, "uid": of.uid, "attempt": adapter.attempt, "step": adapter.step}
    FineTunedModelSpec.model_validate(body["spec"])


def test_the_longest_allowed_name_gives_names_that_kubernetes_takes() -> None:
    name = "a" * MAX_JOB_NAME
    names = [build.attempt_name(name, 1000), build.gang_name(name), build.helper_name(name, "prepare")]
    # A worker's host name is its Job's name and its index.
    assert all(len(f"{found}-255") <= 63 for found in names)
    assert len(set(names)) == 3


def test_master_ports_differ_by_job_and_stay_in_range() -> None:
    ports = {build.master_port(f"uid-{number}") for number in range(100)}
    assert len(ports) > 95
    assert all(20000 <= port < 30000 for port in ports)
