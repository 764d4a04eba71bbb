"""ModelServer and FineTunedModel on the real API server: a hand plays kubelet, fetch and agents."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.operator.world import DIGEST, World
from tests.support.api import Object
from tests.support.wait import wait_for

from tuneward_api.files import AdapterProof, AgentReport, WantedAdapters
from tuneward_api.names import AGENT_PORT, API_VERSION, LABEL_SERVER

pytestmark = pytest.mark.cluster

OTHER_DIGEST = "sha256:" + "cd" * 32
SECONDS = 120
"""Not to be reached."""


class FakeAgent:
    """Port 8001 on a loopback address of its own. `say` is what it reports about a wanted adapter."""

    def __init__(self) -> None:
        self.report = AgentReport(base_ready=True)
        self.ip = f"127.{secrets.randbelow(100) + 100}.{secrets.randbelow(254) + 1}.{secrets.randbelow(254) + 1}"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(outer.report.to_json()).encode()
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer((self.ip, AGENT_PORT), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def say(self, *, ready: bool, reason: str, message: str = "", digest: str = DIGEST) -> None:
        proof = {"name": "ft:tiny:bot:1", "digest": digest, "ready": ready, "reason": reason, "message": message}
        self.report = AgentReport(base_ready=True, adapters=[AdapterProof.model_validate(proof)])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def agents() -> Iterator[Callable[[], FakeAgent]]:
    made: list[FakeAgent] = []

    def make() -> FakeAgent:
        made.append(FakeAgent())
        return made[-1]

    yield make
    for agent in made:
        agent.close()


def serve(world: World, name: str = "assistant", **spec: Any) -> None:
    body = {"apiVersion": API_VERSION, "kind": "ModelServer", "metadata": {"name": name}}
    world.create({**body, "spec": {"model": {"uri": "pvc://tuneward-store/imports/tiny"}, **spec}})


def register(world: World, name: str = "bot-1", *, server: str | None = "assistant", base: str = DIGEST) -> None:
    labels = {} if server is None else {LABEL_SERVER: server}
    folder = f"adapters/sha256-{DIGEST.removeprefix('sha256:')}"
    spec = {
        "servedName": "ft:tiny:bot:1",
        "source": {"job": "bot", "uid": "u", "attempt": 1, "step": 1},
        "base": {"uri": "pvc://tuneward-store/imports/tiny", "digest": base, "architecture": "LlamaForCausalLM"},
        "artifact": {"uri": f"pvc://tuneward-store/{folder}", "digest": DIGEST, "size": 1},
        "adapter": {"rank": 4, "alpha": 8, "targetModules": ["q_proj"]},
    }
    metadata = {"name": name, "labels": labels}
    world.create({"apiVersion": API_VERSION, "kind": "FineTunedModel", "metadata": metadata, "spec": spec})


def fetched(world: World, name: str = "assistant") -> None:
    (pod,) = world.pods_of(f"{name}-fetch")
    base = {
        "uri": "pvc://tuneward-store/imports/tiny",
        "key": "k1",
        "digest": DIGEST,
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "claim": "tuneward-store",
        "subPath": "imports/tiny",
    }
    world.ends(pod, 0, {"outcome": "Done", "reason": "Available", "message": "ok", "base": base})


def server_pods(world: World, count: int = 1) -> list[Object]:
    def enough() -> list[Object] | None:
        pods = world.list("Pod", "tuneward.dev/server=assistant,tuneward.dev/role=server")
        living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return living if len(living) == count else None

    return wait_for(enough, what=f"{count} pods of the server", timeout=SECONDS)


def wait_ready(world: World, kind: str, name: str, status: str, reason: str) -> Object:
    seen: list[object] = []

    def reached() -> Object | None:
        found: Object = world.get(kind, name).get("status", {})
        for condition in found.get("conditions", []):
            seen[:] = [condition]
            if (condition["status"], condition["reason"]) == (status, reason):
                return found
        return None

    try:
        return wait_for(reached, what=f"{kind} {name} Ready={status} {reason}", timeout=SECONDS)
    except AssertionError as error:
        raise AssertionError(f"{error}; last seen: {seen}\n{world.logs()}") from error


def wanted(world: World) -> WantedAdapters:
    return WantedAdapters.model_validate_json(world.get("ConfigMap", "assistant-adapters")["data"]["adapters.json"])


def test_a_server_fetches_converges_and_its_models_are_ready_when_every_replica_proved_them(
    world: World, agents: Callable[[], FakeAgent]
) -> None:
    world.share_operator()
    register(world)
    wait_ready(world, "FineTunedModel", "bot-1", "False", "ServerMissing")
    serve(world, replicas=2)
    wait_ready(world, "ModelServer", "assistant", "False", "FetchingModel")
    fetched(world)
    first, second = server_pods(world, 2)
    wait_for(lambda: [one.name for one in wanted(world).adapters] == ["ft:tiny:bot:1"], what="the wanted list")
    world.wait_gone("Job", "assistant-fetch")
    wait_ready(world, "FineTunedModel", "bot-1", "False", "ServerNotReady")

    good, bad = agents(), agents()
    good.say(ready=True, reason="Verified")
    bad.say(ready=False, reason="DigestMismatch", message="adapter_model.safetensors was changed")
    world.runs(first, good.ip)
    status = wait_ready(world, "ModelServer", "assistant", "True", "Available")
    assert status["baseDigest"] == DIGEST
    assert status["address"] == f"http://assistant.{world.namespace}.svc:8000/v1"
    wait_ready(world, "FineTunedModel", "bot-1", "True", "Served")

    world.runs(second, bad.ip)
    status = wait_ready(world, "FineTunedModel", "bot-1", "False", "DigestMismatch")
    assert status["message"].startswith("1 of 2 replicas proved it; ")
    assert status["message"].endswith("adapter_model.safetensors was changed")
    assert {replica["pod"]: replica["reason"] for replica in status["replicas"]} == {
        first["metadata"]["name"]: "Verified",
        second["metadata"]["name"]: "DigestMismatch",
    }
    bad.say(ready=True, reason="Verified")
    wait_ready(world, "FineTunedModel", "bot-1", "True", "Served")
    status = wait_for(
        lambda: (s := world.get("ModelServer", "assistant")["status"])["readyAdapters"] == 1 and s, what="readyAdapters"
    )
    assert (status["replicas"], status["readyReplicas"], status["adapters"]) == (2, 2, 1)


def test_a_new_adapter_restarts_no_pod_and_reaches_it_at_once(world: World, agents: Callable[[], FakeAgent]) -> None:
    world.share_operator()
    serve(world)
    fetched(world)
    (pod,) = server_pods(world)
    world.runs(pod, agents().ip)
    before = world.get("Pod", pod["metadata"]["name"])
    register(world)

    def bumped() -> bool:
        (found,) = server_pods(world)
        assert found["metadata"]["uid"] == before["metadata"]["uid"]
        list_digest = wanted(world).digest()
        annotated = found["metadata"].get("annotations", {}).get("tuneward.dev/wanted-digest") == list_digest
        return annotated and len(wanted(world).adapters) == 1

    wait_for(bumped, what="the annotation of the new list", timeout=SECONDS)
    world.patch("FineTunedModel", "bot-1", {"spec": {"archived": True}})
    wait_ready(world, "FineTunedModel", "bot-1", "False", "Archived")
    wait_for(lambda: wanted(world).adapters == [], what="an empty list", timeout=SECONDS)


def test_a_base_that_cannot_be_fetched_is_said_in_one_sentence(world: World) -> None:
    world.share_operator()
    serve(world)
    (pod,) = world.pods_of("assistant-fetch")
    sentence = "imports/tiny holds no config.json"
    world.ends(pod, 66, {"outcome": "Failed", "reason": "InputMissing", "message": sentence})
    status = wait_ready(world, "ModelServer", "assistant", "False", "InputMissing")
    assert sentence in status["message"]
    assert world.list("Pod", "tuneward.dev/role=server") == []


def test_models_that_no_server_can_serve_say_why(world: World) -> None:
    world.share_operator()
    register(world, "alone", server=None)
    wait_ready(world, "FineTunedModel", "alone", "True", "Verified")
    serve(world)
    fetched(world)
    register(world, "stranger", base=OTHER_DIGEST)
    status = wait_ready(world, "FineTunedModel", "stranger", "False", "BaseMismatch")
    assert OTHER_DIGEST in status["message"]
    assert wanted(world).adapters == []


def test_what_was_deleted_or_changed_by_hand_comes_back_and_a_deleted_server_takes_its_children(world: World) -> None:
    world.share_operator()
    serve(world)
    fetched(world)
    server_pods(world)
    deployment = f"/apis/apps/v1/namespaces/{world.namespace}/deployments/assistant"
    uid = world.api.get(deployment).json()["metadata"]["uid"]
    world.api.request("DELETE", deployment, json={"propagationPolicy": "Background"})
    wait_for(
        lambda: world.api.get(deployment).json().get("metadata", {}).get("uid", uid) != uid,
        what="another Deployment",
        timeout=SECONDS,
    )
    world.delete("Service", "assistant")
    world.delete("ConfigMap", "assistant-adapters")
    for kind, name in (("Service", "assistant"), ("ConfigMap", "assistant-adapters")):
        world.wait(kind, name)
    selector = world.get("Service", "assistant")["spec"]["selector"]
    world.patch("Service", "assistant", {"spec": {"selector": {"tuneward.dev/role": "nothing"}}})
    wait_for(lambda: world.get("Service", "assistant")["spec"]["selector"] == selector, what="its selector", timeout=SECONDS)
    register(world)
    wait_ready(world, "FineTunedModel", "bot-1", "False", "ServerNotReady")
    world.delete("ModelServer", "assistant")
    wait_ready(world, "FineTunedModel", "bot-1", "False", "ServerMissing")
    wait_for(lambda: world.api.get(deployment).status_code == 404, what="the Deployment to go", timeout=SECONDS)


def test_a_service_of_somebody_else_is_never_taken_over(world: World) -> None:
    world.share_operator()
    spec = {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}
    world.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "assistant"}, "spec": spec})
    serve(world)
    fetched(world)
    status = wait_ready(world, "ModelServer", "assistant", "False", "ObjectRefused")
    assert "there is a Service assistant of another owner; give the ModelServer another name" in status["message"]
    assert world.get("Service", "assistant")["spec"]["selector"] == {"app": "theirs"}


def test_an_operator_killed_and_started_again_changes_nothing_and_goes_on(
    world: World, agents: Callable[[], FakeAgent]
) -> None:
    operator = world.operate()
    register(world)
    serve(world)
    fetched(world)
    (pod,) = server_pods(world)
    agent = agents()
    agent.say(ready=True, reason="Verified")
    world.runs(pod, agent.ip)
    before = wait_ready(world, "FineTunedModel", "bot-1", "True", "Served")
    world.kill(operator)
    agent.say(ready=False, reason="ProofFailed", message="another answer")
    world.operate()
    status = wait_ready(world, "FineTunedModel", "bot-1", "False", "ProofFailed")
    assert status["conditions"][0]["lastTransitionTime"] >= before["conditions"][0]["lastTransitionTime"]
    (same,) = server_pods(world)
    assert same["metadata"]["uid"] == pod["metadata"]["uid"]
    assert world.list("Job") == []
