"""The command's own client, on a real API server."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.cluster import Cluster

from tuneward_cli import kube as module
from tuneward_cli.documents import load_valid
from tuneward_cli.errors import CommandError, RefusedError
from tuneward_cli.kube import JOBS, PODS, Kube
from tuneward_cli.look import the_job

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune.yaml"

pytestmark = pytest.mark.cluster


@pytest.fixture
def kube(control_plane: Cluster, namespace: str) -> Kube:
    return Kube.connect(control_plane.kubeconfig, namespace)


def test_the_example_is_applied_and_deleted(kube: Kube) -> None:
    for document in load_valid(EXAMPLE).values():
        kube.apply(document)
        kube.apply(document)
    assert the_job(kube, "lantern")["spec"]["serve"] == {"server": "smollm2"}
    assert kube.delete(JOBS, "lantern", gone_within=10)
    assert kube.get(JOBS, "lantern") is None
    assert not kube.delete(JOBS, "lantern")


def test_what_the_server_refuses_is_its_own_sentence(kube: Kube) -> None:
    job = load_valid(EXAMPLE).values()[-1]
    job["spec"]["hyperparameters"]["steps"] = 3
    with pytest.raises(RefusedError, match="set epochs or steps, not both"):
        kube.apply(job)


def test_a_job_that_is_not_there_names_those_that_are(kube: Kube) -> None:
    kube.apply(load_valid(EXAMPLE).values()[-1])
    with pytest.raises(CommandError, match=r"no FineTuneJob lamp .*; there are: lantern"):
        the_job(kube, "lamp")


def test_a_kind_that_the_cluster_lacks(kube: Kube) -> None:
    with pytest.raises(CommandError, match="knows no Nothing of v1"):
        kube.apply({"apiVersion": "v1", "kind": "Nothing", "metadata": {"name": "x"}})


def test_an_object_of_that_name_is_no_error(kube: Kube) -> None:
    spec = {"containers": [{"name": "c", "image": "none"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
    assert kube.create(PODS, pod) is not None
    assert kube.create(PODS, pod) is None


def test_nobody_answers(kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Kube, "host", "https://127.0.0.1:9")
    with pytest.raises(CommandError, match="no API server answers"):
        kube.list(JOBS)
