"""What a pod gets: command, environment, files, identity, and how its end is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.local.machine import Namespace, container_of, pod, running, sh
from tests.support.wait import wait_for

pytestmark = pytest.mark.pods

RESTRICTED: dict[str, Any] = {
    "automountServiceAccountToken": False,
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
"""What Pod Security "restricted" asks of a pod, and what every pod of ours says."""

RESTRICTED_CONTAINER: dict[str, Any] = {
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
}


def test_a_command_and_its_arguments_run_with_references_replaced(ns: Namespace) -> None:
    container = {"args": ["$(GREETING) $$(GREETING)"], "env": [{"name": "GREETING", "value": "hello"}]}
    assert ns.finish(pod("echo", ["/bin/echo"], container=container)) == "hello $(GREETING)\n"


def test_a_pod_without_a_command_says_that_images_are_only_names(ns: Namespace) -> None:
    ns.create({**pod("none", []), "spec": {"containers": [{"name": "main", "image": "some/image:1"}]}})
    message = wait_for(lambda: waiting_message(ns, "none"), what="the reason of the waiting container")
    assert "command" in message
    assert "some/image:1" in message


def test_a_command_that_does_not_exist_is_a_start_error(ns: Namespace) -> None:
    ns.create(pod("missing", ["/no/such/command"]))
    ended = container_of(ns.await_pod("missing", "Failed"))["state"]["terminated"]
    assert ended["exitCode"] == 128
    assert "/no/such/command" in ended["message"]


# The first process of a PID namespace ignores signals it has no handler for, so the killed one is its child.
KILLED = """python3 -c 'import os; os.kill(os.getpid(), 9)'; exit $?"""


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), (KILLED, 137)], ids=["exit", "killed"])
def test_the_exit_code_is_the_commands(ns: Namespace, script: str, code: int) -> None:
    ns.create(pod("ends", ["/bin/sh", "-c", script]))
    assert container_of(ns.await_pod("ends", "Failed"))["state"]["terminated"]["exitCode"] == code


def test_the_termination_message_is_reported(ns: Namespace) -> None:
    report = {"digest": "sha256:0", "samples": 12}
    ns.create(pod("reports", sh(f"printf %s '{json.dumps(report)}' > /dev/termination-log")))
    ended = container_of(ns.await_pod("reports", "Succeeded"))["state"]["terminated"]
    assert json.loads(ended["message"]) == report


def test_the_environment_names_pod_address_and_resources(ns: Namespace) -> None:
    container = {
        "resources": {"requests": {"cpu": "250m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            {"name": "HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
            {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
        ],
    }
    said = ns.finish(pod("env", sh("echo $POD_IP $POD_UID $HOST_IP $LABEL $LIMIT; hostname"), container=container))
    seen = ns.get("Pod", "env")
    assert said.split() == [
        seen["status"]["podIP"], seen["metadata"]["uid"], "127.0.0.1", "env", str(128 << 20), "env",
    ]  # fmt: skip
    assert seen["status"]["podIP"].startswith("127.")


def test_configmap_secret_and_downward_files_are_there(ns: Namespace) -> None:
    ns.kubectl("create", "configmap", "settings", "--from-literal=plan.json={}", "--from-literal=other=x")
    ns.kubectl("create", "secret", "generic", "token", "--from-literal=token=s3cret")
    field = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    described = pod(
        "files",
        sh("cat /etc/tuneward/plan.json /etc/token/token /etc/podinfo/labels; ls /etc/tuneward; echo $TOKEN"),
        volumes=[
            {"name": "plan", "configMap": {"name": "settings", "items": [{"key": "plan.json", "path": "plan.json"}]}},
            {"name": "token", "secret": {"secretName": "token"}},
            {"name": "info", "downwardAPI": {"items": [field]}},
        ],
        container={
            "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "token", "key": "token"}}}],
            "volumeMounts": [
                {"name": "plan", "mountPath": "/etc/tuneward"},
                {"name": "token", "mountPath": "/etc/token", "readOnly": True},
                {"name": "info", "mountPath": "/etc/podinfo"},
            ],
        },
    )
    assert ns.finish(described) == '{}s3cretapp="files"plan.json\ns3cret\n'
    assert not Path("/etc/tuneward").exists()


def test_a_configmap_file_follows_its_configmap(ns: Namespace) -> None:
    ns.kubectl("create", "configmap", "wanted", "--from-literal=list=one")
    ns.create(
        pod(
            "follows",
            sh("until grep -q two /etc/wanted/list; do sleep 0.2; done"),
            volumes=[{"name": "wanted", "configMap": {"name": "wanted"}}],
            container={"volumeMounts": [{"name": "wanted", "mountPath": "/etc/wanted"}]},
        )
    )
    ns.await_pod("follows", "Running")
    ns.kubectl("patch", "configmap", "wanted", "-p", '{"data": {"list": "two"}}')
    # An annotation makes the kubelet look now; by itself it takes up to 90 s, as on any cluster.
    ns.kubectl("annotate", "pod", "follows", "tuneward.dev/wanted=two")
    ns.await_pod("follows", "Succeeded", timeout=30)


def test_init_containers_run_first_and_share_an_empty_dir(ns: Namespace) -> None:
    mounts = [{"name": "work", "mountPath": "/mnt/work"}]
    described = pod(
        "ordered",
        sh("cat /mnt/work/order"),
        volumes=[{"name": "work", "emptyDir": {}}],
        initContainers=[
            {"name": name, "image": "local", "command": sh(f"echo {name} >> /mnt/work/order"), "volumeMounts": mounts}
            for name in ("first", "second")
        ],
        container={"volumeMounts": mounts},
    )
    assert ns.finish(described) == "first\nsecond\n"
    assert not Path("/mnt/work").exists()


def test_a_mount_path_that_the_machine_lacks_is_not_made_there(separated: Namespace) -> None:
    described = pod(
        "mirrored",
        sh("echo x > /usr/share/tuneward-test/deep/file; ls /usr/share | wc -l; ls -d /usr/share/doc"),
        volumes=[{"name": "work", "emptyDir": {}}],
        container={"volumeMounts": [{"name": "work", "mountPath": "/usr/share/tuneward-test/deep"}]},
    )
    count, doc = separated.finish(described).split()
    assert int(count) == len(list(Path("/usr/share").iterdir())) + 1
    assert doc == "/usr/share/doc"
    assert not Path("/usr/share/tuneward-test").exists()


def test_a_read_only_root_lets_nothing_be_written_but_the_volumes(separated: Namespace) -> None:
    tried = "for d in / /etc /usr /var /root /home; do if touch $d/tuneward-test 2>/dev/null; then echo wrote $d; fi; done"
    described = pod(
        "sealed",
        sh(f"{tried}; echo fine > /mnt/work/x; cat /mnt/work/x; echo x > /dev/null; echo m > /dev/termination-log"),
        volumes=[{"name": "work", "emptyDir": {}}],
        container={
            "securityContext": {"readOnlyRootFilesystem": True},
            "volumeMounts": [{"name": "work", "mountPath": "/mnt/work"}],
        },
    )
    assert separated.finish(described) == "fine\n"
    assert not Path("/etc/tuneward-test").exists()


def test_run_as_user_is_who_the_container_believes_to_be(separated: Namespace) -> None:
    described = pod("who", sh("id -u; id -g"), securityContext={"runAsUser": 1234, "runAsGroup": 2345})
    assert separated.finish(described) == "1234\n2345\n"


def test_run_as_non_root_needs_no_uid(separated: Namespace) -> None:
    described = pod("nonroot", sh("id -u"), securityContext={"runAsNonRoot": True})
    assert separated.finish(described) != "0\n"


def test_a_restricted_pod_with_a_token_runs(separated: Namespace) -> None:
    separated.kubectl("create", "configmap", "plan", "--from-literal=plan.json={}")
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}
    described = pod(
        "strict",
        sh("id -u; cat /etc/tuneward/plan.json; wc -c < /var/run/secrets/tokens/token; touch /tmp/x 2>&1 || echo sealed"),
        **RESTRICTED,
        volumes=[
            {"name": "plan", "configMap": {"name": "plan"}},
            {"name": "tokens", "projected": {"sources": [token]}},
        ],
        container={
            **RESTRICTED_CONTAINER,
            "volumeMounts": [
                {"name": "plan", "mountPath": "/etc/tuneward"},
                {"name": "tokens", "mountPath": "/var/run/secrets/tokens"},
            ],
        },
    )
    said = separated.finish(described)
    assert said.startswith("65532\n{}")
    assert said.endswith("sealed\n")


def test_a_pods_token_opens_the_api(ns: Namespace) -> None:
    ns.kubectl("create", "rolebinding", "views", "--clusterrole=view", f"--serviceaccount={ns.name}:default")
    script = """
import json, os, ssl, urllib.request
d = "/var/run/secrets/kubernetes.io/serviceaccount/"
host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
namespace = open(d + "namespace").read()
request = urllib.request.Request(
    f"https://{host}:{port}/api/v1/namespaces/{namespace}/pods",
    headers={"Authorization": "Bearer " + open(d + "token").read()})
answer = urllib.request.urlopen(request, context=ssl.create_default_context(cafile=d + "ca.crt"))
print([item["metadata"]["name"] for item in json.load(answer)["items"]])
"""
    assert ns.finish(pod("client", ["python3", "-c", script])) == "['client']\n"


def test_a_pod_is_told_to_end_and_has_its_grace(ns: Namespace) -> None:
    trap = "trap 'echo asked; sleep 1; echo saved; exit 143' TERM; echo up; while :; do sleep 0.1; done"
    ns.create(pod("graceful", ["/bin/sh", "-c", trap], terminationGracePeriodSeconds=30))
    ns.kubectl("patch", "pod", "graceful", "-p", '{"metadata": {"finalizers": ["tuneward.dev/test"]}}')
    ns.await_pod("graceful", "Running")
    # Followed, since the kubelet removes the log of a deleted pod.
    with ns.following("logs", "-f", "graceful") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "up\n"
        ns.kubectl("delete", "pod", "graceful", "--wait=false")
        # A kubelet that has removed the container by then ends the log with that, whatever the runtime.
        assert follower.stdout.read().startswith("asked\nsaved\n")
    ended = container_of(ns.await_pod("graceful", "Failed"))["state"]["terminated"]
    assert ended["exitCode"] == 143
    ns.kubectl("patch", "pod", "graceful", "-p", '{"metadata": {"finalizers": null}}')


def test_a_container_that_fails_starts_again(ns: Namespace) -> None:
    mounts = [{"name": "work", "mountPath": "/mnt/work"}]
    script = "if [ -e /mnt/work/x ]; then echo second; sleep 600; fi; touch /mnt/work/x; echo first; exit 3"
    ns.create(
        pod(
            "again",
            sh(script),
            restartPolicy="Always",
            volumes=[{"name": "work", "emptyDir": {}}],
            container={"volumeMounts": mounts},
        )
    )
    wait_for(lambda: container_of(ns.await_pod("again", "Running"))["restartCount"] == 1, what="the restart")
    wait_for(lambda: ns.logs("again") == "second\n", what="the log of the second life")
    assert ns.logs("again", previous="true") == "first\n"


def test_processes_die_with_the_first_of_their_container(ns: Namespace) -> None:
    marker = f"{ns.name}-child"
    ns.finish(pod("parent", sh(f"python3 -c 'import time; time.sleep(987)' {marker} & echo ok")))
    assert not [line for line in running() if marker in line[1]]


def waiting_message(ns: Namespace, name: str) -> str | None:
    statuses = ns.get("Pod", name)["status"].get("containerStatuses") or [{}]
    message: str | None = statuses[0].get("state", {}).get("waiting", {}).get("message")
    return message
