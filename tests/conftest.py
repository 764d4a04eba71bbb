"""Fixtures that every test folder may use. `control_plane` is one real API server for each test process."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from tests.support.cluster import Cluster, install_crds, running_cluster

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """API server, controller-manager and scheduler with our CRDs; no node."""
    with running_cluster("--control-plane-only") as cluster:
        install_crds(cluster)
        yield cluster


@pytest.fixture
def namespace(control_plane: Cluster) -> str:
    return control_plane.namespace()
