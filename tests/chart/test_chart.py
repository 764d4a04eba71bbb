"""The chart, rendered by the real helm and taken by the real API server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster import BIN, ROOT, Cluster

CHART = ROOT / "charts" / "tuneward"
HELM = BIN / "helm"


def helm(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120)


def rendered(tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    done = helm("template", "tuneward", str(CHART), "-n", "tuneward-system", *flags, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


@pytest.mark.cluster
class TestChart:
    def test_lint(self, tmp_path: Path) -> None:
        done = helm("lint", "--strict", str(CHART), tmp_path=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("image=x", "additional properties 'image' not allowed"),
            ("store.accessMode=Many", "at '/store/accessMode'"),
            ("store.size=big", "at '/store/size'"),
            ("settings.POLL=1", "at '/settings'"),
            ("images.operator=", "at '/images/operator'"),
        ],
    )
    def test_wrong_values_are_refused_by_name(self, tmp_path: Path, flag: str, message: str) -> None:
        done = helm("template", "tuneward", str(CHART), "--set", flag, tmp_path=tmp_path)
        assert done.returncode != 0
        assert message in done.stderr

    def test_the_server_takes_all_of_it(self, tmp_path: Path, control_plane: Cluster, namespace: str) -> None:
        done = helm("template", "tuneward", str(CHART), "-n", namespace, "--set", "crds.enabled=false", tmp_path=tmp_path)
        control_plane.kubectl("apply", "--dry-run=server", "-f", "-", stdin=done.stdout)

    def test_the_operator_pod_passes_restricted_pod_security(
        self, tmp_path: Path, control_plane: Cluster, namespace: str
    ) -> None:
        control_plane.kubectl("label", "ns", namespace, "pod-security.kubernetes.io/enforce=restricted")
        template = one(rendered(tmp_path), "Deployment")["spec"]["template"]
        spec = {key: value for key, value in template["spec"].items() if key != "serviceAccountName"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}
        control_plane.kubectl("-n", namespace, "create", "serviceaccount", "unused")
        control_plane.kubectl("-n", namespace, "apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod))

    def test_crds_can_be_left_out_and_are_kept(self, tmp_path: Path) -> None:
        kinds = [item["kind"] for item in rendered(tmp_path, "--set", "crds.enabled=false")]
        assert "CustomResourceDefinition" not in kinds
        crds = [item for item in rendered(tmp_path) if item["kind"] == "CustomResourceDefinition"]
        assert {crd["metadata"]["annotations"]["helm.sh/resource-policy"] for crd in crds} == {"keep"}
        assert len(crds) == 3

    def test_policies_name_this_namespace_and_the_scrapers(self, tmp_path: Path) -> None:
        flags = ("--set", "networkPolicy.enabled=true", "--set", "networkPolicy.scrapers={monitoring}")
        objects = rendered(tmp_path, *flags)
        env = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
        value = {"name": "TUNEWARD_NETWORK_POLICY_NAMESPACES", "value": "tuneward-system,monitoring"}
        assert value in env
        assert any("networkpolicies" in rule["resources"] for rule in one(objects, "ClusterRole")["rules"])
        assert not any("networkpolicies" in rule["resources"] for rule in one(rendered(tmp_path), "ClusterRole")["rules"])

    def test_openshift_chooses_the_user(self, tmp_path: Path) -> None:
        pod = one(rendered(tmp_path, "--set", "runAsUser=-1", "--set", "fsGroup=-1"), "Deployment")["spec"]["template"][
            "spec"
        ]
        assert "runAsUser" not in pod["securityContext"]
        names = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        assert (names["TUNEWARD_RUN_AS_USER"], names["TUNEWARD_FS_GROUP"]) == ("-1", "-1")
