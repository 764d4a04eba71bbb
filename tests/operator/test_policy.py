"""With namespaces that may read progress, each gang has a NetworkPolicy, which the real API server takes."""

from __future__ import annotations

import pytest
from tests.operator.world import World


@pytest.mark.cluster
def test_a_gang_has_its_policy_before_its_pods(world: World) -> None:
    world.operate("--network-policy-namespaces", "tuneward-system")
    world.submit()
    world.prepare_done()
    world.wait("Job", "bot-a1")
    policy = world.get("NetworkPolicy", "bot-gang")
    assert policy["metadata"]["ownerReferences"][0]["name"] == "bot"
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
