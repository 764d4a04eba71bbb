"""Addresses, names, Services, probes, and kubectl's ways into a pod."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.local.machine import Namespace, pod, sh
from tests.support.wait import wait_for

pytestmark = pytest.mark.pods

SERVE = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (os.environ["POD_NAME"] + "\\n").encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
http.server.HTTPServer((os.environ["POD_IP"], 8080), Handler).serve_forever()
"""

# Only root may listen below 1024, and the Service proxy is a process of the user.
PORT = 8000

ABOUT_ITSELF = [
    {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
]


def server_container(**more: Any) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    return {"env": ABOUT_ITSELF, "ports": [{"containerPort": 8080, "name": "http"}], "readinessProbe": probe, **more}


def server(name: str, **more: Any) -> dict[str, Any]:
    return pod(name, ["python3", "-c", SERVE], container=server_container(**more), restartPolicy="Always")


def service(name: str, selector: dict[str, str], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": selector, "ports": [{"port": PORT, "targetPort": "http"}], **spec},
    }  # fmt: skip


def fetch(url: str) -> str:
    # Pod and Service addresses are loopback addresses of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def fetched(url: str) -> str | None:
    try:
        return fetch(url)
    except OSError:
        return None


def test_two_pods_listen_on_one_port_each_at_its_own_address(ns: Namespace) -> None:
    ns.create(server("one"), server("two"))
    for name in ("one", "two"):
        address = ns.await_ready(name)["status"]["podIP"]
        assert fetch(f"http://{address}:8080/") == f"{name}\n"


@pytest.mark.parametrize(
    "probe",
    [
        {"exec": {"command": ["/bin/sh", "-c", "test -e /mnt/work/ready"]}},
        {"tcpSocket": {"port": 8080}},
        {"httpGet": {"path": "/", "port": "http"}},
    ],
    ids=["exec", "tcp", "http"],
)
def test_a_readiness_probe_holds_the_pod_back_until_it_passes(ns: Namespace, probe: dict[str, Any]) -> None:
    # It serves once it is told to, through a file that `kubectl exec` writes.
    waits = f"until [ -e /mnt/work/ready ]; do sleep 0.1; done; exec python3 -c '{SERVE.replace(chr(39), chr(34))}'"
    container = server_container(
        readinessProbe={**probe, "periodSeconds": 1}, volumeMounts=[{"name": "work", "mountPath": "/mnt/work"}]
    )
    ns.create(pod("probed", sh(waits), container=container, volumes=[{"name": "work", "emptyDir": {}}]))
    found = ns.await_pod("probed", "Running")
    assert {c["type"]: c["status"] for c in found["status"]["conditions"]}["Ready"] == "False"
    ns.kubectl("exec", "probed", "--", "touch", "/mnt/work/ready")
    ns.await_ready("probed")


def test_a_failing_liveness_probe_restarts_the_container(ns: Namespace) -> None:
    probe = {"exec": {"command": ["/bin/false"]}, "periodSeconds": 1, "failureThreshold": 1}
    ns.create(pod("dead", sh("exec sleep 600"), restartPolicy="Always", container={"livenessProbe": probe}))
    wait_for(lambda: restarts(ns, "dead") >= 1, what="a restart")


def restarts(ns: Namespace, name: str) -> int:
    statuses = ns.get("Pod", name)["status"].get("containerStatuses") or [{"restartCount": 0}]
    return int(statuses[0]["restartCount"])


def deployment(name: str, replicas: int) -> dict[str, Any]:
    template = server("unused")
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": template["spec"]},
        },
    }  # fmt: skip


def test_a_deployment_answers_behind_the_address_of_its_service(ns: Namespace) -> None:
    ns.create(deployment("web", 2), service("web", {"app": "web"}))
    ns.kubectl("rollout", "status", "deployment/web", "--timeout=60s", timeout=70)
    address = ns.get("Service", "web")["spec"]["clusterIP"]
    names = {item["metadata"]["name"] for item in ns.list("Pod", labelSelector="app=web")}
    seen = set()

    def all_answered() -> bool:
        seen.add((fetched(f"http://{address}:{PORT}/") or "").strip())
        return names <= seen

    wait_for(all_answered, what=f"an answer from each of {names}")


def test_a_service_is_found_by_name_from_a_pod(ns: Namespace) -> None:
    ns.create(deployment("web", 1), service("web", {"app": "web"}))
    ns.kubectl("rollout", "status", "deployment/web", "--timeout=60s", timeout=70)
    names = ["web", f"web.{ns.name}", f"web.{ns.name}.svc", f"web.{ns.name}.svc.cluster.local"]
    script = f"""
import time, urllib.request
for name in {names}:
    end = time.monotonic() + 20
    while True:
        try:
            print(urllib.request.urlopen(f"http://{{name}}:{PORT}/", timeout=5).read().decode().strip())
            break
        except OSError:
            if time.monotonic() > end: raise
            time.sleep(0.1)
"""
    said = ns.finish(pod("client", ["python3", "-c", script]))
    assert len(said.split()) == 4
    assert {word.rsplit("-", 2)[0] for word in said.split()} == {"web"}


def test_a_service_follows_its_pods(ns: Namespace) -> None:
    ns.create(server("first"), service("web", {"role": "web"}))
    ns.await_ready("first")
    address = ns.get("Service", "web")["spec"]["clusterIP"]
    assert fetched(f"http://{address}:{PORT}/") is None
    ns.kubectl("label", "pod", "first", "role=web")
    wait_for(lambda: fetched(f"http://{address}:{PORT}/") == "first\n", what="the first pod's answer")
    ns.create(server("second"))
    ns.await_ready("second")
    ns.kubectl("label", "pod", "first", "role-")
    ns.kubectl("label", "pod", "second", "role=web")
    wait_for(lambda: fetched(f"http://{address}:{PORT}/") == "second\n", what="the second pod's answer")


def test_a_service_that_cannot_answer_says_why(ns: Namespace) -> None:
    if ns.machine.user.uid is None:
        pytest.skip("root may open any port")
    low = service("low", {"app": "none"})
    low["spec"]["ports"] = [{"port": 80}]
    ns.create(low)
    seen = wait_for(lambda: ns.list("Event", fieldSelector="involvedObject.name=low"), what="the event")
    assert "use a port above 1023" in seen[0]["message"]


def gang(name: str, script: str, workers: int = 2) -> dict[str, Any]:
    described = pod("unused", ["python3", "-c", script], container={"env": ABOUT_ITSELF}, subdomain=name)
    template = {"metadata": {"labels": {"gang": name}}, "spec": described["spec"]}
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed", "completions": workers, "parallelism": workers, "backoffLimit": 0,
            "template": template,
        },
    }  # fmt: skip


MEET = """
import os, socket, time
index, name = int(os.environ["JOB_COMPLETION_INDEX"]), "gang"
if index == 0:
    listener = socket.create_server((os.environ["POD_IP"], 29400))
    connection, _ = listener.accept()
    connection.sendall(b"hello")
else:
    end = time.monotonic() + 40
    while True:
        try:
            connection = socket.create_connection(("gang-0.gang", 29400), timeout=5)
            break
        except OSError:
            if time.monotonic() > end: raise
            time.sleep(0.1)
    print(connection.recv(5).decode())
"""


def test_the_workers_of_an_indexed_job_meet_by_name(ns: Namespace) -> None:
    """Before either is ready: publishNotReadyAddresses is how the ranks of a gang find their leader."""
    ns.create(service("gang", {"gang": "gang"}, clusterIP="None", publishNotReadyAddresses=True), gang("gang", MEET))
    ns.await_job("gang", "Complete")
    assert "hello" in ns.kubectl("logs", "-l", "gang=gang", "--tail=-1")


def test_logs_are_followed_to_the_end(ns: Namespace) -> None:
    ns.create(pod("talks", sh("for i in 1 2 3; do echo $i; sleep 0.3; done; printf last")))
    ns.await_pod("talks", "Running")
    assert ns.kubectl("logs", "-f", "talks") == "1\n2\n3\nlast"


def test_exec_runs_inside_with_input_output_and_exit_code(ns: Namespace) -> None:
    ns.kubectl("create", "configmap", "plan", "--from-literal=x=inside")
    ns.create(
        pod(
            "open",
            sh("exec sleep 600"),
            volumes=[{"name": "plan", "configMap": {"name": "plan"}}],
            container={"volumeMounts": [{"name": "plan", "mountPath": "/etc/tuneward"}]},
        )
    )
    ns.await_pod("open", "Running")
    assert ns.kubectl("exec", "open", "--", "cat", "/etc/tuneward/x") == "inside"
    assert ns.kubectl("exec", "-i", "open", "--", "cat", stdin="through\n") == "through\n"
    assert ns.kubectl("exec", "open", "--", "hostname").strip() == "open"
    failed = ns.machine.cluster.try_kubectl("-n", ns.name, "exec", "open", "--", "sh", "-c", "echo no >&2; exit 9")
    assert failed.returncode == 9
    assert failed.stderr.startswith("no\n")


def test_exec_in_a_restricted_pod_is_the_same_user(separated: Namespace) -> None:
    separated.create(pod("user", sh("exec sleep 600"), securityContext={"runAsUser": 65532, "runAsNonRoot": True}))
    separated.await_pod("user", "Running")
    assert separated.kubectl("exec", "user", "--", "id", "-u") == "65532\n"


def test_many_bytes_pass_through_exec_unchanged(ns: Namespace) -> None:
    """`tuneward import` streams a model through exec."""
    ns.create(pod("sink", sh("exec sleep 600")))
    ns.await_pod("sink", "Running")
    counted = ns.kubectl("exec", "-i", "sink", "--", "wc", "-c", stdin="x" * (8 << 20))
    assert int(counted) == 8 << 20


@contextmanager
def forwarded(ns: Namespace, target: str, port: int) -> Iterator[int]:
    """`kubectl port-forward` to a port the kernel chooses."""
    with ns.following("port-forward", target, f":{port}") as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().split(" -> ")[0].rsplit(":", 1)[1])


def test_port_forward_reaches_a_pod_and_a_service(ns: Namespace) -> None:
    ns.create(server("one"), service("web", {"app": "one"}))
    ns.await_ready("one")
    for target, port in (("pod/one", 8080), ("service/web", PORT)):
        with forwarded(ns, target, port) as local:
            assert fetch(f"http://127.0.0.1:{local}/") == "one\n"


def test_the_node_says_what_the_machine_has(ns: Namespace) -> None:
    (node,) = json.loads(ns.kubectl("get", "nodes", "-o", "json"))["items"]
    capacity = node["status"]["capacity"]
    assert capacity["nvidia.com/gpu"] == "3"
    assert int(capacity["cpu"]) >= 1
    assert capacity["memory"] not in ("0", "")
    assert capacity["ephemeral-storage"] not in ("0", "")
    assert {"type": "InternalIP", "address": "127.0.0.1"} in node["status"]["addresses"]
    assert node["status"]["nodeInfo"]["kubeletVersion"] == "v1.36.3"


def gpu_pod(name: str, count: int, script: str) -> dict[str, Any]:
    return pod(name, sh(script), container={"resources": {"limits": {"nvidia.com/gpu": str(count)}}})


def test_gpus_are_given_to_one_pod_at_a_time(ns: Namespace) -> None:
    ns.create(gpu_pod("two", 2, "exec sleep 600"))
    ns.await_pod("two", "Running")
    ns.create(gpu_pod("more", 2, "true"))
    wait_for(lambda: "Insufficient nvidia.com/gpu" in json.dumps(ns.get("Pod", "more")["status"]), what="the refusal")
    ns.finish(gpu_pod("one", 1, "true"))
    ns.kubectl("delete", "pod", "two")
    ns.await_pod("more", "Succeeded")


def test_no_container_sees_a_gpu_it_was_not_given(ns: Namespace) -> None:
    """An empty CUDA_VISIBLE_DEVICES, not a missing one: the machine may have real GPUs, and the fake ones are none."""
    said = "echo ${CUDA_VISIBLE_DEVICES-missing}"
    assert ns.finish(pod("none", sh(said))) == "\n"
    assert ns.finish(gpu_pod("fake", 1, said)) == "\n"
