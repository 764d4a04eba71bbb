"""`world`: a fresh namespace with nobody in it yet; the test starts the operator when it wants one."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from tests.operator.world import World, client
from tests.support.cluster import Cluster


@pytest.fixture(scope="session")
def api(control_plane: Cluster) -> Iterator[httpx.Client]:
    with client(control_plane.kubeconfig) as found:
        yield found


@pytest.fixture
def world(control_plane: Cluster, namespace: str, api: httpx.Client) -> Iterator[World]:
    made = World(control_plane, namespace, api)
    yield made
    made.end()
