"""The demo, run once for real; every end-to-end test looks at what it left."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.command import MODEL, Command, Demo
from tests.support.cluster import BINARY, Cluster


@pytest.fixture(scope="session")
def command() -> Iterator[Command]:
    assert BINARY.exists(), "the local cluster is not built; run: make local"
    assert MODEL.is_dir(), "the demo's base model is missing; run: make model"
    home = Path(tempfile.mkdtemp(prefix="tuneward-e2e-"))
    found = Command(home)
    try:
        yield found
    finally:
        found.run("down", "--purge", timeout=120)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def fresh() -> Iterator[Path]:
    """A home without a cluster, and nothing left of it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="tuneward-e2e-"))
    try:
        yield home
    finally:
        Command(home).run("down", "--purge", timeout=120)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def store(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workstation's, with the base model in it; each job has a folder of its own there."""
    folder = tmp_path_factory.mktemp("workstation") / "store"
    command.ok("import", str(MODEL), "smollm2-135m-instruct", "--store", str(folder))
    return folder


@pytest.fixture(scope="session")
def demo(command: Command) -> Demo:
    done = command.run("demo", "--no-prompt", "--output", "json", timeout=1200)
    said = f"{done.stderr}\n{_operator_log(command.home)}"
    assert done.returncode == 0, said
    kubeconfig = command.home / "kubeconfig"
    return Demo(command, Cluster(data=command.home, kubeconfig=kubeconfig), json.loads(done.stdout), done.stderr)


def _operator_log(home: Path) -> str:
    cluster = Cluster(data=home, kubeconfig=home / "kubeconfig")
    return cluster.try_kubectl("-n", "tuneward-system", "logs", "deployment/tuneward-operator", "--tail=40").stdout
