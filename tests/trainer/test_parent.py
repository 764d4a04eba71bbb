"""Going on from a FineTunedModel: its adapter is the state at step 0, whatever becomes of the model meanwhile."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.trainer.jobs import PREFERENCE, Gang, Job, filed, make_job, make_pairs, train, written
from transformers import LlamaForCausalLM

from tuneward_api import manifest, names
from tuneward_api.conditions import Reason
from tuneward_api.files import Parent
from tuneward_api.finetunejob import Method
from tuneward_api.resolved import ResolvedMethod, ResolvedPacking
from tuneward_trainer import models, parent, patches, prepare, rundir
from tuneward_trainer.facts import examine
from tuneward_trainer.models import Found
from tuneward_trainer.report import EndError
from tuneward_trainer.store import Places

NOTHING = {"learning_rate": 1e-30, "weight_decay": 0.0, "steps": 1}
"""An update that is lost in rounding."""


@pytest.fixture(scope="module", params=["LoRA", "DoRA"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Parent]:
    """A job that ended in a filed adapter, and that as a parent."""
    job = train(make_job(tmp_path_factory.mktemp("store"), method={"type": request.param}))
    adapter = filed(job)
    return job, Parent(
        name=names.model_name("tiny", adapter.digest),
        base_uri="pvc://claim/tiny",
        base_digest=job.plan.prepared.base.digest,
        artifact_uri=f"pvc://claim/{adapter.sub_path}",
        artifact_digest=adapter.digest,
    )


def places(job: Job) -> Places:
    return Places(job.store, job.store / "claims", job.store / "configmaps")


def base(job: Job, **changes: Any) -> Found:
    folder = job.store / "models/tiny"
    values: dict[str, Any] = {"uri": "pvc://claim/tiny", "key": "tiny", "digest": job.plan.prepared.base.digest}
    return Found(folder, folder, claim="claim", sub_path="models/tiny", **values | changes)


def child(of: tuple[Job, Parent], name: str, *, hyper: dict[str, Any] | None = None, **changes: Any) -> Job:
    """The same job on the same data, going on from the other's adapter, which prepare has taken into its run directory."""
    job, model = of
    request = job.plan.request.model_copy(update={"run_directory": f"jobs/{name}", "parent": model})
    numbers = job.plan.prepared.hyperparameters.model_copy(update=hyper or {})
    prepared = job.plan.prepared.model_copy(update={"hyperparameters": numbers, **changes})
    made = written(Job(job.store, job.plan.model_copy(update={"request": request, "prepared": prepared})))
    parent.take(model, base(job), places=places(job), store_claim="claim", run=made.run)
    return made


def test_without_learning_it_is_the_parent(finished: tuple[Job, Parent]) -> None:
    job = train(child(finished, "same", hyper=NOTHING))
    assert job.adapter() == finished[0].adapter()


def test_all_weights_begin_at_the_base_model_s_with_the_adapter_added(finished: tuple[Job, Parent]) -> None:
    """On two ranks, as PEFT merges it; what is trained then is a model of its own that names no adapter."""
    method = ResolvedMethod(type="Full", trainable_parameters=0)
    packing = ResolvedPacking(mode="Packed", reason="", patches=list(patches.OF_WHOLE_MODELS))
    job = train(child(finished, "whole", hyper=NOTHING, method=method, packing=packing), 2)
    folder = job.run / str(job.results()[0].adapter_directory)
    found = load_file(folder / "model/model.safetensors")
    base = LlamaForCausalLM.from_pretrained(job.store / "models/tiny")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    filed = job.store / finished[1].artifact_uri.removeprefix("pvc://claim/")
    expected = PeftModel.from_pretrained(base, str(filed / "adapter")).merge_and_unload().state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(before[name], tensor) for name, tensor in found.items())
    assert found.keys() == before.keys() - {"lm_head.weight"}
    (first,), (last,) = job.results(), finished[0].results()
    assert first.metrics.validation_loss_before == pytest.approx(last.metrics.validation_loss_after, rel=1e-5)
    assert "peft" not in (folder / "model/config.json").read_text()


@pytest.mark.parametrize("kind", ["LoRA", "Full"])
def test_a_model_that_was_trained_whole_is_the_base_model(finished: tuple[Job, Parent], kind: str) -> None:
    """Its files are looked at as an adapter's are."""
    job, model = finished
    folder = job.store / f"tuned/{kind}"
    shutil.copytree(job.store / "models/tiny", folder / "model")
    (folder / "model/MANIFEST.json").unlink()
    whole = model.model_copy(
        update={
            "whole": True,
            "artifact_uri": f"pvc://claim/tuned/{kind}",
            "artifact_digest": manifest.write_manifest(folder),
        }
    )
    spec = job.plan.request.spec.model_copy(update={"method": Method.model_validate({"type": kind})})
    request = job.plan.request.model_copy(update={"parent": whole, "spec": spec})
    found = models.find(request.base_uri, places=places(job), store_claim="claim")
    assert (found.sub_path, found.digest) == (f"tuned/{kind}/model", manifest.digest_of(manifest.scan(folder / "model")))
    facts = examine(found.folder)
    assert prepare.method_of(request, found, facts, places(job), job.run).type == kind
    (folder / "model/config.json").write_text("{}")
    with pytest.raises(EndError, match=r"are not at pvc://claim/tuned/.* as they were filed"):
        prepare.method_of(request, found, facts, places(job), job.run)


def test_its_first_validation_loss_is_the_parent_s_last(finished: tuple[Job, Parent]) -> None:
    job = train(child(finished, "first", hyper={"steps": 2}))
    (before,), (after,) = finished[0].results(), job.results()
    assert after.metrics.validation_loss_before == pytest.approx(before.metrics.validation_loss_after, rel=1e-6)
    assert after.metrics.validation_loss_before != pytest.approx(before.metrics.validation_loss_before, rel=1e-4)


def test_any_number_of_ranks_and_any_kill_give_the_same_adapter(finished: tuple[Job, Parent]) -> None:
    alone = train(child(finished, "alone"))
    assert alone.adapter() != finished[0].adapter()
    # The base model makes no difference, whole or shared.
    job = child(finished, "killed", base_weights="Sharded")
    gang = Gang(job, 2)
    gang.until(lambda: gang.steps() >= 4 and any((job.run / "checkpoints").glob("*/MANIFEST.json")))
    gang.processes[1].kill()
    gang.wait()
    train(job)
    assert job.adapter() == alone.adapter()
    assert job.results()[0].from_step > 0
    assert job.results()[0].metrics.validation_loss_before == alone.results()[0].metrics.validation_loss_before


def test_the_reference_of_preferences_is_the_parent(finished: tuple[Job, Parent]) -> None:
    """With the base model as the reference the first margins would not be 0."""
    pairs = finished[0].store / "data/pairs"
    if not pairs.exists():
        make_pairs(pairs)
    job = child(finished, "preference", hyper={"steps": 3}, objective=PREFERENCE)
    job.environment["TUNEWARD_DATA_DIR"] = str(pairs)
    train(job)
    lines = [json.loads(line) for line in (job.run / "attempts/1/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[1]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(lines[1]["reward_margin"]) < 1e-4


def test_what_becomes_of_the_parent_afterwards_changes_nothing(finished: tuple[Job, Parent]) -> None:
    job, model = finished
    made = child(finished, "orphan", hyper=NOTHING)
    files = job.store / model.artifact_uri.removeprefix("pvc://claim/")
    aside = files.with_name("aside")
    files.rename(aside)
    try:
        assert train(made).adapter() == job.adapter()
        # prepare, run again, finds what it took.
        parent.take(model, base(job), places=places(job), store_claim="claim", run=made.run)
        with pytest.raises(EndError) as caught:
            parent.take(model, base(job), places=places(job), store_claim="claim", run=job.store / "jobs/late")
    finally:
        aside.rename(files)
    assert caught.value.reason == Reason.INPUT_MISSING
    assert (
        f"the files of FineTunedModel {model.name} are not at {model.artifact_uri} as they were filed"
        in caught.value.message
    )


def test_a_copy_that_was_cut_short_is_made_again(finished: tuple[Job, Parent]) -> None:
    job, model = finished
    made = child(finished, "cut")
    (made.run / "parent/adapter/adapter_model.safetensors").write_bytes(b"cut")
    codes = Gang(made).wait()
    assert codes == [66]
    parent.take(model, base(job), places=places(job), store_claim="claim", run=made.run)
    train(made)


def test_another_base_model_is_refused(finished: tuple[Job, Parent]) -> None:
    job, model = finished
    with pytest.raises(EndError) as caught:
        parent.take(model, base(job, digest="sha256:new"), places=places(job), store_claim="claim", run=job.run)
    assert caught.value.message == (
        f"the base model at pvc://claim/tiny has digest sha256:new, and FineTunedModel {model.name} was trained on sha256:base; "
        "bring the files back that it was trained on"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 8}, "spec.method.rank is 8, and the adapter of FineTunedModel tiny has 4; leave spec.method.rank out"),
        ({"alpha": 16}, "spec.method.alpha is 16.0, and the adapter of FineTunedModel tiny has 8.0"),
        ({"rsLoRA": True}, "spec.method.rsLoRA is true, and the adapter of FineTunedModel tiny has false"),
        (
            {"targetModules": ["q_proj"]},
            'spec.method.targetModules is ["q_proj"], and the adapter of FineTunedModel tiny has ["d',
        ),
    ],
)
def test_a_method_that_is_not_the_adapter_s_is_refused(
    finished: tuple[Job, Parent], asked: dict[str, Any], said: str
) -> None:
    folder = finished[0].store / finished[1].artifact_uri.removeprefix("pvc://claim/")
    with pytest.raises(EndError) as caught:
        parent.method(Method.model_validate(asked), folder, examine(finished[0].store / "models/tiny"), "tiny")
    assert caught.value.message.startswith(said)
    assert caught.value.reason == Reason.CONFIG_INVALID


def test_the_adapter_decides_its_shape_and_the_job_its_dropout(finished: tuple[Job, Parent]) -> None:
    job, model = finished
    folder = job.store / model.artifact_uri.removeprefix("pvc://claim/")
    asked = Method.model_validate({"rank": 4, "dropout": 0.1})
    found = parent.method(asked, folder, examine(job.store / "models/tiny"), "tiny")
    own = job.plan.prepared.method
    assert found.trainable_parameters > 0
    assert found == own.model_copy(update={"dropout": 0.1, "trainable_parameters": found.trainable_parameters})


def test_a_run_directory_of_another_parent_is_refused(finished: tuple[Job, Parent]) -> None:
    job = train(child(finished, "other", hyper={"steps": 3}))
    strange = finished[1].model_copy(update={"artifact_digest": "sha256:" + "0" * 64})
    shutil.rmtree(job.run / "parent")
    request = job.plan.request.model_copy(update={"parent": strange})
    other = written(Job(job.store, job.plan.model_copy(update={"request": request})))
    assert Gang(other).wait() == [66]
    assert rundir.attempt_numbers(other.run) == [1]
