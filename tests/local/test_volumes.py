"""Claims and subPaths: what the store of a namespace is made of."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from tests.local.machine import Namespace, claim, pod, sh
from tests.local.test_pods import RESTRICTED, RESTRICTED_CONTAINER
from tests.support.wait import wait_for

pytestmark = pytest.mark.pods


def with_store(name: str, script: str, mounts: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    volume = {"name": "store", "persistentVolumeClaim": {"claimName": "store"}}
    container = {**spec.pop("container", {}), "volumeMounts": mounts}
    return pod(name, sh(script), volumes=[volume], container=container, **spec)


def directory_of(ns: Namespace, claim_name: str = "store") -> Path:
    volume = ns.get("PersistentVolumeClaim", claim_name)["spec"]["volumeName"]
    source = json.loads(ns.kubectl("get", "pv", volume, "-o", "json"))["spec"]
    path = source.get("hostPath") or source.get("local")
    return Path(path["path"])


def test_there_is_a_default_storage_class(ns: Namespace) -> None:
    (found,) = json.loads(ns.kubectl("get", "storageclass", "-o", "json"))["items"]
    assert found["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"] == "true"
    assert found["volumeBindingMode"] == "WaitForFirstConsumer"


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteMany"])
def test_a_claim_is_bound_once_a_pod_wants_it_and_keeps_what_is_written(ns: Namespace, mode: str) -> None:
    ns.create(claim("store", mode))
    assert ns.get("PersistentVolumeClaim", "store")["status"]["phase"] == "Pending"
    mounts = [{"name": "store", "mountPath": "/mnt/store"}]
    ns.finish(with_store("writes", "echo kept > /mnt/store/file", mounts))
    assert ns.finish(with_store("reads", "cat /mnt/store/file", mounts)) == "kept\n"


def test_the_directory_of_a_claim_lies_in_the_data_directory_open_to_all_uids(ns: Namespace) -> None:
    ns.create(claim("store"))
    ns.finish(with_store("writes", "touch /mnt/store/file", [{"name": "store", "mountPath": "/mnt/store"}]))
    directory = directory_of(ns)
    assert directory.is_relative_to(ns.machine.data)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2777
    owner = ns.machine.user.uid if ns.machine.user.uid is not None else os.getuid()
    assert (directory / "file").stat().st_uid == owner


def test_a_deleted_claim_takes_its_directory_along(ns: Namespace) -> None:
    ns.create(claim("store"))
    ns.finish(with_store("writes", "touch /mnt/store/file", [{"name": "store", "mountPath": "/mnt/store"}]))
    directory = directory_of(ns)
    ns.kubectl("delete", "pod", "writes")
    ns.kubectl("delete", "pvc", "store")
    wait_for(lambda: not directory.exists(), what=f"{directory} to go")


def test_two_pods_at_once_share_a_claim(ns: Namespace) -> None:
    ns.create(claim("store", "ReadWriteMany"))
    mounts = [{"name": "store", "mountPath": "/mnt/store"}]
    for own, other in (("a", "b"), ("b", "a")):
        script = f"touch /mnt/store/{own}; until [ -e /mnt/store/{other} ]; do sleep 0.1; done"
        ns.create(with_store(own, script, mounts))
    ns.await_pod("a", "Succeeded")
    ns.await_pod("b", "Succeeded")


def test_subpaths_show_a_part_each_with_its_own_right_to_write(separated: Namespace) -> None:
    separated.create(claim("store"))
    whole = [{"name": "store", "mountPath": "/mnt/store"}]
    separated.finish(
        with_store("prepares", "mkdir -p /mnt/store/models/m /mnt/store/jobs/j; echo w > /mnt/store/models/m/w", whole)
    )
    parts: list[dict[str, Any]] = [
        {"name": "store", "mountPath": "/mnt/model", "subPath": "models/m", "readOnly": True},
        {"name": "store", "mountPath": "/mnt/run", "subPath": "jobs/j"},
    ]
    script = "cat /mnt/model/w; touch /mnt/model/x 2>/dev/null || echo refused; echo r > /mnt/run/r; ls /mnt/run"
    assert separated.finish(with_store("trains", script, parts)) == "w\nrefused\nr\n"
    assert (directory_of(separated) / "jobs/j/r").read_text() == "r\n"


def test_a_missing_subpath_is_made(ns: Namespace) -> None:
    ns.create(claim("store"))
    parts = [{"name": "store", "mountPath": "/mnt/run", "subPath": "new/folder"}]
    ns.finish(with_store("makes", "echo r > /mnt/run/r", parts))
    assert (directory_of(ns) / "new/folder/r").exists()


def test_a_subpath_of_one_file_is_a_file(ns: Namespace) -> None:
    ns.kubectl("create", "configmap", "plan", "--from-literal=plan.json={}")
    described = pod(
        "file",
        sh("cat /etc/plan.json; ls -ld /etc/passwd > /dev/null && echo whole"),
        volumes=[{"name": "plan", "configMap": {"name": "plan"}}],
        container={"volumeMounts": [{"name": "plan", "mountPath": "/etc/plan.json", "subPath": "plan.json"}]},
    )
    assert ns.finish(described) == "{}whole\n"


def test_a_restricted_pod_has_store_plan_and_token(separated: Namespace) -> None:
    """The shape of an attempt's pod, which must run for root and without privileges."""
    separated.create(claim("store"))
    separated.kubectl("create", "configmap", "plan", "--from-literal=plan.json={}")
    whole = [{"name": "store", "mountPath": "/mnt/store"}]
    prepares = "mkdir -m 2775 -p /mnt/store/models /mnt/store/jobs; echo w > /mnt/store/models/w"
    separated.finish(with_store("prepares", prepares, whole, **RESTRICTED, container=RESTRICTED_CONTAINER))
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}
    attempt = pod(
        "trains",
        sh("id -u; cat /mnt/model/w /etc/tuneward/plan.json; test -s /var/run/secrets/t/token; echo r > /mnt/run/r"),
        **RESTRICTED,
        volumes=[
            {"name": "store", "persistentVolumeClaim": {"claimName": "store"}},
            {"name": "plan", "configMap": {"name": "plan"}},
            {"name": "token", "projected": {"sources": [token]}},
            {"name": "tmp", "emptyDir": {}},
        ],
        container={
            **RESTRICTED_CONTAINER,
            "volumeMounts": [
                {"name": "store", "mountPath": "/mnt/model", "subPath": "models", "readOnly": True},
                {"name": "store", "mountPath": "/mnt/run", "subPath": "jobs"},
                {"name": "plan", "mountPath": "/etc/tuneward"},
                {"name": "token", "mountPath": "/var/run/secrets/t"},
                {"name": "tmp", "mountPath": "/tmp"},
            ],
        },
    )
    assert separated.finish(attempt) == "65532\nw\n{}"


def test_a_deleted_pod_leaves_nothing_in_the_kubelets_directory(ns: Namespace) -> None:
    ns.create(claim("store"))
    parts = [{"name": "store", "mountPath": "/mnt/run", "subPath": "jobs"}]
    ns.create(with_store("short", "sleep 600", parts))
    uid = ns.await_pod("short", "Running")["metadata"]["uid"]
    (left,) = list(ns.machine.data.rglob(f"pods/{uid}"))
    ns.kubectl("delete", "pod", "short")
    # The kubelet's own orphan clean-up runs every 2 s; the volumes go before the pod object does.
    wait_for(lambda: not left.exists(), what=f"{left} to go", timeout=30)
