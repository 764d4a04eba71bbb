"""Fixtures that every test folder may use. `control_plane` is one real API server for each test process."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, install_crds, running_cluster
from xdist.scheduler.loadscope import LoadScopeScheduling

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is loaded: threads that spin at barriers take the processors that other tests need.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# What torch and transformers load stays, and need not be looked at by the collector again and again.
gc.set_threshold(50_000)
# The same of Kubernetes, which is started some thirty times: a fifth of its processor time for 150 MB a cluster.
os.environ.setdefault("GOGC", "400")


FIRST = ("tests/e2e/", "tests/local/", "tests/trainer/test_workstation_runs.py", "tests/trainer/test_supervise.py")
"""Where the longest tests are: begun last, they would be waited for."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST)))


class ByCluster(LoadScopeScheduling):  # type: ignore[misc]
    """Where several processes test, what uses one cluster stays in one of them, and otherwise what is in one file.

    (xdist's own marks for that, `--dist loadgroup`, group nothing under pytest 9.2: pytest-xdist issue 1386.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        name = Path(file).stem
        if file.startswith("tests/e2e/") and name != "test_interrupt":
            return "the demo's cluster"
        if file.startswith("tests/local/"):
            user = next((word for word in re.split(r"\W", test.partition("[")[2]) if word), "")
            cluster = {"test_faults": "broken", "test_runtime": "one way"}.get(name, "shared")
            return f"{cluster}, of {user}"
        return file

    def remove_node(self, node: Any) -> str | None:
        """A test whose process ended has failed; xdist would begin it again and again."""
        assigned: dict[str, dict[str, bool]] = self.assigned_work[node]
        for tests in assigned.values():
            for test, done in tests.items():
                if not done:
                    tests[test] = True
                    super().remove_node(node)
                    return test
        unfinished: str | None = super().remove_node(node)
        return unfinished


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByCluster:
    return ByCluster(config, log)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """API server, controller-manager and scheduler with our CRDs; no node."""
    with running_cluster("--control-plane-only") as cluster:
        install_crds(cluster)
        yield cluster


@pytest.fixture
def namespace(control_plane: Cluster) -> str:
    return control_plane.namespace()
