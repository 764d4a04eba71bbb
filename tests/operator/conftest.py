"""`world`: a fresh namespace of a real API server; the test says which operator works in it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from tests.operator.world import Operators, World
from tests.support.api import client
from tests.support.cluster import Cluster


@pytest.fixture(scope="session")
def api(control_plane: Cluster) -> Iterator[httpx.Client]:
    with client(control_plane.kubeconfig) as found:
        yield found


@pytest.fixture(scope="session")
def operators(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    found = Operators(control_plane, tmp_path_factory.mktemp("operators"))
    yield found
    found.end()


@pytest.fixture
def world(operators: Operators, namespace: str, api: httpx.Client) -> Iterator[World]:
    made = World(operators, namespace, api)
    yield made
    made.end()
