"""Jobs that go on from a FineTunedModel: which one they may, and what happens while it is missing."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.pictures import owner
from tests.operator.test_served import model
from tests.operator.world import DIGEST, World, result
from tests.support.wait import wait_for

from tuneward_api.files import Parent, Request
from tuneward_operator.cache import Cache
from tuneward_operator.inputs import inputs_of
from tuneward_operator.observe import parent_of
from tuneward_operator.views import ResourceView, resource_view


def known(**changes: Any) -> Cache[ResourceView]:
    """One model of the job's namespace."""
    body = model(1).body
    spec = {**body["spec"], **changes.get("spec", {})}
    metadata = {**body["metadata"], "namespace": "team", "name": "elder", **changes.get("metadata", {})}
    cache: Cache[ResourceView] = Cache()
    cache.put(resource_view({"metadata": metadata, "spec": spec, "status": changes.get("status", {})}))
    return cache


def unready(reason: str) -> dict[str, Any]:
    return {"conditions": [{"type": "Ready", "status": "False", "reason": reason, "message": f"it is {reason}"}]}


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (known(), ""),
        (known(status=unready("ServerMissing")), ""),
        (known(status=unready("Loading")), ""),
        (Cache[ResourceView](), "does not exist; `kubectl get ftm` lists those of this namespace"),
        (known(metadata={"namespace": "other"}), "does not exist; `kubectl get ftm` lists those of this namespace"),
        (
            known(metadata={"deletionTimestamp": "2026-11-25T12:00:00Z"}),
            "is being deleted; `kubectl get ftm` lists those of",
        ),
        (known(spec={"archived": True}), "is archived; set its spec.archived to false, or name another"),
        (known(status=unready("DigestMismatch")), "cannot be gone on from: it is DigestMismatch"),
        (known(spec={"adapter": None}), ""),
        (known(spec={"base": {}}), "cannot be read at spec.base; is this operator older than the CRD?"),
    ],
)
def test_which_model_can_be_gone_on_from(models: Cache[ResourceView], problem: str) -> None:
    found, said = parent_of(owner(model={"uri": "model://elder"}), models)
    assert (found is None) == bool(problem)
    assert said.startswith(f"FineTunedModel elder (spec.model.uri) {problem}" if problem else "")
    assert bool(said) == bool(problem)


def test_what_is_pinned_of_it() -> None:
    found, _ = parent_of(owner(model={"uri": "model://elder"}), known())
    record = model(1).body["spec"]
    assert found == Parent(
        name="elder",
        base_uri=record["base"]["uri"],
        base_digest=record["base"]["digest"],
        artifact_uri=record["artifact"]["uri"],
        artifact_digest=record["artifact"]["digest"],
    )
    assert parent_of(owner(), Cache()) == (None, "")


def test_of_a_model_that_was_trained_whole_its_own_folder_is_needed_and_not_its_base_model() -> None:
    job = owner(model={"uri": "model://elder"})
    found, _ = parent_of(
        job, known(spec={"adapter": None, "base": {**model(1).body["spec"]["base"], "uri": "pvc://old/base"}})
    )
    assert found is not None
    assert (found.whole, found.starts_from) == (True, f"{found.artifact_uri}/model")
    assert "old" not in {needed.uri.authority for needed in inputs_of(job.spec, found)}


def elder(world: World) -> None:
    """A model of an earlier job."""
    spec = {**model(1).body["spec"]}
    body = {"apiVersion": "tuneward.dev/v1alpha1", "kind": "FineTunedModel", "metadata": {"name": "elder"}, "spec": spec}
    world.create(body)


@pytest.mark.cluster
def test_a_job_goes_on_from_a_model_and_ends_in_one_that_names_it(world: World) -> None:
    """The parent is missing at first, and is deleted again while prepare waits for its node."""
    world.share_operator()
    world.submit(model={"uri": "model://elder"})
    status = world.wait_phase("Pending")
    assert status["message"].startswith("FineTunedModel elder (spec.model.uri) does not exist")
    assert world.condition("Stalled")["reason"] == "InputMissing"
    assert world.find("Job", "bot-prepare") is None
    elder(world)
    world.wait_phase("Validating")
    world.wait("Job", "bot-prepare")
    world.delete("FineTunedModel", "elder")
    world.wait_gone("FineTunedModel", "elder")
    request = Request.model_validate_json(world.get("ConfigMap", "bot-request")["data"]["request.json"])
    assert request.parent is not None
    assert request.base_uri == "hf://org/tiny@abc"
    world.prepare_done()
    (pod,) = world.pods_of("bot-a1")
    status = world.wait_phase("Starting")
    assert status["resolved"]["parent"] == {"name": "elder", "digest": request.parent.artifact_digest}
    world.leader(pod, attempt=1, step=10)
    world.wait_phase("Running")
    world.ends(pod, 0, result(pod, 1))
    world.wait("Job", "bot-finish")
    world.finish_done()
    world.wait_phase("Succeeded")
    made = world.get("FineTunedModel", "bot-abababab")
    assert made["spec"]["parent"] == {"name": "elder", "digest": request.parent.artifact_digest}
    assert made["spec"]["artifact"]["digest"] == DIGEST


@pytest.mark.cluster
def test_a_prepare_that_fails_once_the_model_is_gone_says_so(world: World) -> None:
    world.share_operator()
    elder(world)
    world.submit(model={"uri": "model://elder"})
    (pod,) = world.pods_of("bot-prepare")
    world.delete("FineTunedModel", "elder")
    world.wait_gone("FineTunedModel", "elder")
    world.ends(pod, 75, {"outcome": "Failed", "reason": "Infrastructure", "message": "the hub did not answer"})
    status = world.wait_phase("Pending")
    assert "FineTunedModel elder (spec.model.uri) does not exist" in status["message"]
    elder(world)
    wait_for(lambda: world.status()["phase"] == "Validating", what="another try")
