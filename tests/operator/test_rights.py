"""The operator with the rights that the chart gives it, and no others: a job, a server, policies, in any namespace."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from tests.operator.test_servers import fetched, serve, server_pods
from tests.operator.world import World, result, running
from tests.support.api import Object, checked
from tests.support.cluster import BIN, ROOT

ACCOUNT = "tuneward-operator"


@pytest.fixture
def kubeconfig(world: World, tmp_path: Path) -> Path:
    """Of a service account with the chart's ClusterRole, and nothing else."""
    chart = [str(ROOT / "charts" / "tuneward"), "-n", world.namespace, "--show-only", "templates/rbac.yaml"]
    command = [str(BIN / "helm"), "template", "tuneward", *chart, "--set", "networkPolicy.enabled=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"HOME": str(tmp_path)}, timeout=60)
    world.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT}})
    for body in yaml.safe_load_all(done.stdout):
        # The cluster is shared: names of the cluster's scope are this test's own.
        for named in (body["metadata"], body.get("roleRef", {})):
            named["name"] = f"{ACCOUNT}-{world.namespace}"
        checked(world.api.post(f"/apis/{body['apiVersion']}/{body['kind'].lower()}s", json=body))
    ask: Object = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = checked(world.api.post(world.path("ServiceAccount", ACCOUNT, "token"), json=ask))["status"]["token"]
    config = yaml.safe_load(world.operators.cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.cluster
def test_the_charts_rights_are_enough(world: World, kubeconfig: Path) -> None:
    world.operators.end_shared()
    world.operators.start("--network-policy-namespaces", "tuneward-system", kubeconfig=kubeconfig)
    world.submit(serve={"server": "assistant"})
    pod = running(world)
    policy = world.get("NetworkPolicy", "bot-gang")
    assert policy["metadata"]["ownerReferences"][0]["name"] == "bot"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    world.ends(pod, 0, result(pod, 1))
    world.finish_done()
    world.wait_phase("Succeeded")
    serve(world)
    fetched(world)
    server_pods(world)
    world.delete("Service", "assistant")
    world.wait("Service", "assistant")
    assert "forbidden" not in world.logs().lower()
