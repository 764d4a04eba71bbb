"""Who is served and what is built, by tables and whole objects; no API server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tuneward_api.conditions import Reason
from tuneward_api.files import AdapterProof, AgentReport, WantedAdapter, WantedAdapters
from tuneward_api.modelserver import ModelServerSpec
from tuneward_operator.build_server import (
    BasePlace,
    Server,
    adapters_configmap,
    deployment,
    fetch_configmap,
    fetch_job,
    service,
)
from tuneward_operator.models import decide
from tuneward_operator.served import Replica, Serving, Verdict, asks_of, judge
from tuneward_operator.settings import Settings
from tuneward_operator.views import ResourceView, resource_view

BASE, OTHER = "sha256:" + "aa" * 32, "sha256:" + "bb" * 32
SETTINGS = Settings(image_trainer="trainer:1", image_server="server:1")


def server(**spec: Any) -> Server:
    found = {"model": {"uri": "hf://org/Tiny-1.0@abc"}, **spec}
    return Server(namespace="ns", name="assistant", uid="u1", spec=ModelServerSpec.model_validate(found))


def model(number: int, *, base: str = BASE, claim: str = "tuneward-store", **more: Any) -> ResourceView:
    """`number` is its age in reverse: 2 is newer than 1."""
    digest = f"sha256:{number:064x}"
    folder = f"adapters/sha256-{number:064x}"
    spec = {
        "servedName": f"ft:tiny:{number}",
        "source": {"job": "bot", "uid": "u", "attempt": 1, "step": 1},
        "base": {"uri": "hf://org/tiny@abc", "digest": base, "architecture": "LlamaForCausalLM"},
        "artifact": {"uri": f"pvc://{claim}/{folder}", "digest": digest, "size": 1},
        "adapter": {"rank": 4, "alpha": 8.0, "targetModules": ["q_proj"]},
        **more,
    }
    metadata = {
        "namespace": "ns",
        "name": f"m{number}",
        "uid": f"m{number}",
        "resourceVersion": "1",
        "labels": {"tuneward.dev/server": "assistant"},
        "creationTimestamp": datetime(2026, 1, number, tzinfo=UTC).isoformat(),
    }
    return resource_view({"metadata": metadata, "spec": spec})


def adapter(number: int) -> WantedAdapter:
    digest = f"{number:064x}"
    return WantedAdapter(
        name=f"ft:tiny:{number}", model=f"m{number}", path=f"sha256-{digest}", digest=f"sha256:{digest}", rank=4
    )


def test_the_newest_models_of_the_same_base_are_wanted() -> None:
    found = asks_of(
        server(maxAdapters=2), BASE, [model(1), model(2), model(3), model(4, archived=True), model(5, base=OTHER)]
    )
    assert list(found) == ["m5", "m3", "m2", "m1"]
    assert (found["m3"], found["m2"]) == (adapter(3), adapter(2))
    assert isinstance(found["m1"], Verdict)
    assert found["m1"].reason == Reason.TOO_MANY_ADAPTERS
    assert isinstance(found["m5"], Verdict)
    assert found["m5"].reason == Reason.BASE_MISMATCH
    assert Serving(asks=found).wanted() == WantedAdapters(adapters=[adapter(3), adapter(2)])


def test_two_models_of_the_same_bytes_take_one_place() -> None:
    twin = model(1)
    twin.body["metadata"]["name"] = "twin"
    first = model(1)
    again = resource_view({**twin.body, "metadata": {**twin.body["metadata"], "uid": "twin"}})
    found = asks_of(server(maxAdapters=1), BASE, [first, again])
    assert {name: isinstance(ask, WantedAdapter) for name, ask in found.items()} == {"m1": True, "twin": True}
    assert len(Serving(asks=found).wanted().adapters) == 1


def test_files_in_another_store_cannot_be_mounted() -> None:
    found = asks_of(server(), BASE, [model(1, claim="elsewhere")])["m1"]
    assert isinstance(found, Verdict)
    assert found.reason == Reason.ARTIFACT_MISSING
    assert "pvc://elsewhere/adapters" in found.message


def replica(pod: str, reason: Reason | None, message: str = "") -> Replica:
    """None: the agent does not answer."""
    if reason is None:
        return Replica(pod=pod)
    one = adapter(1)
    ready = reason == Reason.VERIFIED
    proof = AdapterProof(name=one.name, digest=one.digest, ready=ready, reason=reason, message=message)
    return Replica(pod=pod, report=AgentReport(base_ready=True, adapters=[proof]))


V, D, L = Reason.VERIFIED, Reason.DIGEST_MISMATCH, Reason.LOADING


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ([], (False, Reason.SERVER_NOT_READY, "no replica of its ModelServer is ready")),
        ([V], (True, Reason.SERVED, "1 of 1 replicas proved it; ask for ft:tiny:1")),
        ([V, V], (True, Reason.SERVED, "2 of 2 replicas proved it; ask for ft:tiny:1")),
        ([V, None], (False, L, "1 of 2 replicas proved it; p1: its agent does not answer")),
        ([L, D], (False, D, "0 of 2 replicas proved it; p1: DigestMismatch")),
        ([V, L], (False, L, "1 of 2 replicas proved it; p1: Loading")),
    ],
)
def test_a_model_is_served_when_at_least_one_and_every_ready_replica_proved_it(
    reasons: list[Reason | None], expected: tuple[bool, Reason, str]
) -> None:
    replicas = [replica(f"p{index}", reason, str(reason)) for index, reason in enumerate(reasons)]
    assert judge(adapter(1), replicas) == expected


def test_a_proof_of_other_bytes_under_the_same_name_does_not_count() -> None:
    other = adapter(1).model_copy(update={"digest": OTHER})
    assert judge(other, [replica("p", V)]).reason == Reason.LOADING


@pytest.mark.parametrize(
    ("labels", "spec", "exists", "serving", "expected"),
    [
        ({}, {}, False, None, (True, Reason.VERIFIED)),
        ({}, {"archived": True}, False, None, (False, Reason.ARCHIVED)),
        ({"tuneward.dev/server": "gone"}, {}, False, None, (False, Reason.SERVER_MISSING)),
        ({"tuneward.dev/server": "assistant"}, {}, True, None, None),
        ({"tuneward.dev/server": "assistant"}, {}, True, Serving(), None),
        (
            {"tuneward.dev/server": "assistant"},
            {},
            True,
            Serving(asks={"m1": adapter(1)}, replicas=(replica("p", V),)),
            (True, Reason.SERVED),
        ),
        (
            {"tuneward.dev/server": "assistant"},
            {},
            True,
            Serving(asks={"m1": adapter(1)}, waits=Verdict(False, Reason.SERVER_NOT_READY, "fetching")),
            (False, Reason.SERVER_NOT_READY),
        ),
    ],
)
def test_what_a_model_says(
    labels: dict[str, str],
    spec: dict[str, Any],
    exists: bool,
    serving: Serving | None,
    expected: tuple[bool, Reason] | None,
) -> None:
    view = model(1, **spec)
    view.labels.clear()
    view.labels.update(labels)
    found = decide(view, server_exists=exists, serving=serving)
    assert (found and found[:2]) == expected


def test_a_base_model_of_its_own_says_which_server_it_needs() -> None:
    """Asked of the server of another base it says the same."""
    view = model(1, adapter=None)
    address = f"make a ModelServer whose spec.model.uri is {view.spec['artifact']['uri']}/model"
    (asked,) = asks_of(server(), BASE, [view]).values()
    assert asked == Verdict(False, Reason.BASE_MISMATCH, f"it is a base model of its own; {address}")
    view.labels.clear()
    said = decide(view, server_exists=False, serving=None)
    assert said == (True, Reason.VERIFIED, f"its files were verified; it is a base model of its own: {address}")


META = {
    "namespace": "ns",
    "name": "assistant",
    "labels": {
        "app.kubernetes.io/managed-by": "tuneward",
        "tuneward.dev/server": "assistant",
        "tuneward.dev/server-uid": "u1",
        "tuneward.dev/role": "server",
    },
    "ownerReferences": [
        {
            "apiVersion": "tuneward.dev/v1alpha1",
            "kind": "ModelServer",
            "name": "assistant",
            "uid": "u1",
            "controller": True,
        }
    ],
}
SELECTOR = {"tuneward.dev/server-uid": "u1", "tuneward.dev/role": "server"}


def test_the_service_whole() -> None:
    assert service(server()) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": META,
        "spec": {
            "selector": SELECTOR,
            "ports": [{"name": "http", "port": 8000, "targetPort": 8000, "protocol": "TCP"}],
        },
    }


def test_the_wanted_list_whole() -> None:
    wanted = WantedAdapters(adapters=[adapter(1)])
    found = adapters_configmap(server(), wanted)
    assert {**found, "data": {}} == {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**META, "name": "assistant-adapters"},
        "data": {},
    }
    assert WantedAdapters.model_validate_json(found["data"]["adapters.json"]) == wanted


def hardened(name: str, command: list[str], resources: object, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "image": "server:1",
        "command": ["python", "-m", "tuneward_serving", *command],
        "env": [
            {"name": "HOME", "value": "/mnt/tmp"},
            {"name": "USER", "value": "tuneward"},
            {"name": "TMPDIR", "value": "/mnt/tmp"},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "TUNEWARD_API_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
        ],
        "resources": resources,
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/mnt/tmp"},
            {"name": "claim-0", "mountPath": "/mnt/model", "readOnly": True, "subPath": "models/k1"},
            {"name": "claim-0", "mountPath": "/mnt/adapters", "readOnly": True, "subPath": "adapters"},
            {"name": "configmap-2", "mountPath": "/etc/tuneward/adapters", "readOnly": True},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **more,
    }


def probe(path: str, port: int, period: int, failures: int) -> dict[str, object]:
    get = {"path": path, "port": port, "scheme": "HTTP"}
    return {"httpGet": get, "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures}


def test_the_deployment_whole() -> None:
    asked = server(
        replicas=2,
        maxRank=32,
        apiKeySecretRef={"name": "keys"},
        resources={"limits": {"memory": "4Gi"}},
        nodeSelector={"disk": "fast"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
    )
    found = deployment(asked, BasePlace(claim="tuneward-store", path="models/k1"), SETTINGS)
    limits = ["--max-adapters", "16", "--max-rank", "32"]
    assert found == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": META,
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": SELECTOR},
            "template": {
                "metadata": {
                    "labels": META["labels"],
                    "annotations": {
                        "sidecar.istio.io/inject": "false",
                        "linkerd.io/inject": "disabled",
                        "karpenter.sh/do-not-disrupt": "true",
                        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                    },
                },
                "spec": {
                    "restartPolicy": "Always",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "nodeSelector": {"disk": "fast"},
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                        "runAsUser": 65532,
                        "runAsGroup": 65532,
                        "fsGroup": 65532,
                        "fsGroupChangePolicy": "OnRootMismatch",
                    },
                    "containers": [
                        hardened(
                            "engine",
                            ["engine", "--port", "8000", *limits, "--served-base-name", "Tiny-1.0"],
                            {
                                "requests": {"cpu": "1", "memory": "4Gi"},
                                "limits": {"cpu": "4", "memory": "4Gi"},
                            },
                            ports=[{"name": "http", "containerPort": 8000, "protocol": "TCP"}],
                            readinessProbe=probe("/health", 8000, 2, 2),
                            startupProbe=probe("/health", 8000, 2, 900),
                        ),
                        hardened(
                            "agent",
                            ["agent", "--port", "8001", *limits],
                            {
                                "requests": {"cpu": "50m", "memory": "128Mi"},
                                "limits": {"cpu": "1", "memory": "512Mi"},
                            },
                            ports=[{"name": "agent", "containerPort": 8001, "protocol": "TCP"}],
                            readinessProbe=probe("/readyz", 8001, 2, 2),
                            livenessProbe=probe("/healthz", 8001, 30, 3),
                        ),
                    ],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {}},
                        {"name": "claim-0", "persistentVolumeClaim": {"claimName": "tuneward-store"}},
                        {"name": "configmap-2", "configMap": {"name": "assistant-adapters"}},
                    ],
                },
            },
        },
    }


def test_only_the_fetch_pod_sees_the_models_secret_and_the_source_claim() -> None:
    asked = server(model={"uri": "pvc://models/org/tiny", "secretRef": {"name": "hub"}})
    request = fetch_configmap(asked)
    assert request["data"] == {"request.json": '{"storeClaim":"tuneward-store","uri":"pvc://models/org/tiny"}'}
    job = fetch_job(asked, SETTINGS)
    assert (job["kind"], job["metadata"]["name"], request["metadata"]["name"]) == (
        "Job",
        "assistant-fetch",
        "assistant-fetch",
    )
    pod = job["spec"]["template"]["spec"]
    (main,) = pod["containers"]
    assert main["command"] == ["python", "-m", "tuneward_trainer", "fetch", "--request", "/etc/tuneward/request.json"]
    assert main["env"][-1] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert {mount["mountPath"]: mount.get("readOnly", False) for mount in main["volumeMounts"]} == {
        "/mnt/tmp": False,
        "/etc/tuneward": True,
        "/mnt/store": False,
        "/mnt/claims/models": True,
    }
    assert pod["restartPolicy"] == "Never"
    assert "hub" not in str(deployment(asked, BasePlace(claim="models", path="org/tiny"), SETTINGS))


def test_a_models_claim_on_one_node_holds_the_fetch_and_the_replicas() -> None:
    of = replace(server(model={"uri": "pvc://models/tiny"}), held=("models",))
    bodies = [fetch_job(of, SETTINGS), deployment(of, BasePlace(claim="models", path="tiny"), SETTINGS)]
    for template in (body["spec"]["template"] for body in bodies):
        (term,) = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchLabels"] == {"claim.tuneward.dev/models": ""}
        assert template["metadata"]["labels"].items() >= {("claim.tuneward.dev/models", "")}
    free = deployment(server(), BasePlace(claim="tuneward-store", path="tiny"), SETTINGS)
    assert "affinity" not in free["spec"]["template"]["spec"]
