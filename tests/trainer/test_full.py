"""method.type Full: all weights trained, each rank with its shard; held against a plain loop, kills and other gangs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.trainer.jobs import Gang, Job, filed, make_job, step_lines, tiny_config, train
from tests.trainer.test_checkpoint import FACTS, full_disk, newest_step, snapshot
from tests.trainer.test_evaluation import HELD_OUT, TALK, generations, talks
from tests.trainer.test_exactness import spin
from tests.trainer.test_memory import LENGTHS, MISTRAL_7B, batch_of, config_of, data_of, saved
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tuneward_api import manifest
from tuneward_api.estimate import GIB, Data, Setup, memory
from tuneward_api.files import Proof, SavedCheckpoint
from tuneward_api.resolved import ResolvedPacking
from tuneward_api.shape import Shape
from tuneward_trainer import patches, verify
from tuneward_trainer.checkpoint import Saver
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.distributed import Crew
from tuneward_trainer.engine import BETAS
from tuneward_trainer.memory import remedy
from tuneward_trainer.proof import logprobs
from tuneward_trainer.schedule import Schedule

FULL: dict[str, Any] = {
    "type": "Full", "rank": None, "alpha": None, "dropout": None, "rs_lora": None, "target_modules": None,
}  # fmt: skip
PACKED = ResolvedPacking(mode="Packed", reason="", patches=list(patches.OF_WHOLE_MODELS))
CLOSE = pytest.approx


def whole_job(store: Path, **changes: Any) -> Job:
    return make_job(store, method=FULL, **{"packing": PACKED, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Trained by one rank."""
    return train(whole_job(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def pair(alone: Job) -> Job:
    """The same by two."""
    return train(alone.again("pair"), 2)


def folder(job: Job) -> Path:
    result = next(result for result in job.results() if result.outcome == "Succeeded")
    return job.run / str(result.adapter_directory)


def weights(job: Job) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder(job) / "model/model.safetensors")
    return found


def losses(job: Job) -> list[float]:
    return [json.loads(line)["train_loss"] for line in step_lines(job)]


def norms(job: Job) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in step_lines(job)]


def test_one_rank_is_a_plain_loop(alone: Job) -> None:
    """transformers' model, torch's AdamW and gradient clip, one document a forward pass."""
    hyper, store = alone.plan.prepared.hyperparameters, alone.store
    documents = Documents.open(store / "data/tiny" / TRAINING)
    model = LlamaForCausalLM.from_pretrained(store / "models/tiny").eval()
    parameters = list(model.parameters())
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": hyper.weight_decay},
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS)
    schedule, seen = Schedule(documents.lengths, hyper), []
    for step in range(hyper.steps):
        chosen = [documents[index] for group in schedule.micro_batches(step) for index in group]
        total = sum(float(document.weights.sum(dtype=np.float64)) for document in chosen)
        loss = torch.stack([plain_loss(model, document) for document in chosen]).sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, hyper.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    assert losses(alone) == CLOSE([loss for loss, _ in seen], rel=2e-5)
    assert norms(alone) == CLOSE([norm for _, norm in seen], rel=2e-4)
    found = weights(alone)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=2e-4)


def plain_loss(model: torch.nn.Module, document: Any) -> torch.Tensor:
    ids = torch.from_numpy(document.ids.astype(np.int64))
    scores: torch.Tensor = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return -(scores.gather(-1, ids[1:, None])[:, 0] * torch.from_numpy(document.weights[1:].astype(np.float32))).sum()


def test_two_ranks_train_as_one_does(alone: Job, pair: Job) -> None:
    """Gradients are added up in another order."""
    assert losses(pair) == CLOSE(losses(alone), rel=2e-5)
    assert norms(pair) == CLOSE(norms(alone), rel=2e-4)
    one, two = weights(alone), weights(pair)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-4)


def test_packed_rows_equal_one_document_a_forward(alone: Job, tmp_path: Path) -> None:
    """Also without the loss head, and with ranks that have unlike numbers of documents."""
    apart = ResolvedPacking(mode="OneDocument", reason="", patches=[])
    job = train(whole_job(tmp_path, packing=apart), 3)
    assert losses(job) == CLOSE(losses(alone), rel=2e-5)


def test_the_export_is_a_model_of_its_own(alone: Job) -> None:
    """It has the base model's other files, and answers as the proof says."""
    made = folder(alone)
    manifest.verify(made)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert type(model) is LlamaForCausalLM
    assert model.config.tie_word_embeddings
    proof = Proof.model_validate_json((made / "proof.json").read_bytes())
    base = LlamaForCausalLM.from_pretrained(alone.store / "models/tiny")
    assert proof.dtype == "float32"
    for text in proof.texts:
        assert logprobs(model, text.ids) == CLOSE(text.tuned, abs=1e-4)
        assert logprobs(base, text.ids) == CLOSE(text.base, abs=1e-4)
        assert text.tuned != CLOSE(text.base, abs=1e-2)


def test_finish_files_it_as_a_base_model(alone: Job) -> None:
    made = filed(alone)
    assert made.whole
    assert (made.rank, made.target_modules) == (None, None)
    assert made.folder == f"tuned/sha256-{made.digest.removeprefix('sha256:')}/model"
    assert (alone.store / made.folder / "config.json").is_file()


@pytest.mark.parametrize("moment", [pytest.param("in a step", marks=pytest.mark.slow), "in a save"])
def test_killed_and_resumed_is_the_same_to_the_byte(pair: Job, moment: str) -> None:
    job = pair.again(f"killed-{moment.replace(' ', '-')}")
    gang = Gang(job, 2)
    gang.until(lambda: complete(job) >= 1)
    if moment == "in a save":
        gang.until(lambda: len(list((job.run / "checkpoints").glob("*/shards"))) > complete(job))
    else:
        spin(random.Random(5).uniform(0, 0.03))
    gang.processes[1].kill()
    assert gang.wait().count(-9) == 1
    train(job, 2)
    assert weights(job).keys() == weights(pair).keys()
    assert (folder(job) / "model/model.safetensors").read_bytes() == (folder(pair) / "model/model.safetensors").read_bytes()
    newest = job.results()[0]
    assert newest.from_step > 0
    assert newest.resume == "exact"


def complete(job: Job) -> int:
    return sum(map(manifest.complete, (job.run / "checkpoints").glob("*")))


def test_another_number_of_ranks_goes_on_from_the_same_state(alone: Job) -> None:
    job = alone.again("fewer")
    gang = Gang(job, 2)
    gang.until(lambda: gang.steps() >= 2)
    gang.processes[1].terminate()
    assert gang.wait() == [143, 143]
    stopped = job.results()[0]
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.step == stopped.step
    train(job, 1)
    newest = job.results()[0]
    assert (newest.from_step, newest.resume) == (stopped.step, "equivalent (ranks 2 -> 1)")
    assert losses(job) == CLOSE(losses(alone)[stopped.step :], rel=2e-5)


def test_no_more_checkpoints_stay_than_are_kept(pair: Job) -> None:
    left = sorted(entry.name for entry in (pair.run / "checkpoints").iterdir())
    assert left == ["step-00000009.a1", "step-00000012.a1"]
    shards = [entry.path for entry in manifest.read_manifest(pair.run / "checkpoints" / left[-1])[1]]
    assert shards == ["shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp", "state.json"]


def test_the_best_state_is_the_result(tmp_path: Path) -> None:
    """Random documents cannot be learnt: the validation loss soon rises, and what was lowest is read back from its shards."""
    spec = {"evaluation": {"everySteps": 1, "patience": 2}, "checkpoint": {"everySteps": 4}, "datasets": HELD_OUT}
    job = train(whole_job(tmp_path, spec=spec, hyper={"learning_rate": 0.02}), 2)
    result = job.results()[0]
    measured = [json.loads(line) for line in lines(job) if "validation_loss" in line]
    lowest = min(measured[1:], key=lambda line: line["validation_loss"])
    assert result.step == lowest["step"] < result.steps
    assert result.metrics.validation_loss_after == CLOSE(lowest["validation_loss"], rel=1e-6)
    assert f"step {result.step} had the lowest validation loss and is the result" in result.message


def lines(job: Job) -> list[str]:
    return (job.run / "attempts/1/metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.Gemma2Config(),
        transformers.Qwen2Config(tie_word_embeddings=True),
        transformers.MixtralConfig(),
        transformers.CohereConfig(),
    ],
    ids=lambda config: str(config.model_type),
)
def test_the_patches_agree_with_the_plain_model(config: Any) -> None:
    """The gradients of all weights, the head's and the embeddings' among them; Gemma 2's scores are soft-capped."""
    kind = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForCausalLM")
    assert verify._examine(kind, config, whole=True).patches == list(patches.OF_WHOLE_MODELS)


def test_routers_and_vision_stay_as_they_are() -> None:
    from tuneward_trainer.model import text_parameters

    config = transformers.MixtralConfig(**tiny_config().to_diff_dict() | {"model_type": "mixtral", "num_local_experts": 4})
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    left = {name for name, _ in model.named_parameters()} - text_parameters(model).keys()
    assert left == {name for name, _ in model.named_parameters() if ".gate." in name}
    assert left


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3", "Mixtral"])
def test_what_is_saved_for_the_backward_pass_is_known(family: str) -> None:
    config, batch = config_of(family), batch_of(*LENGTHS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "Gemma2" else "sdpa").eval()
    setup = Setup(tokens=batch.tokens, full=True, rank=0)
    estimated = memory(Shape.of(config.to_dict()), data_of(batch), setup)
    assert estimated.activations == CLOSE(saved(model, batch, names=patches.OF_WHOLE_MODELS), rel=0.05)


def test_what_ranks_share_is_divided_and_too_little_memory_asks_for_more_of_them(tmp_path: Path) -> None:
    """7 billion parameters on GPUs of 80 GB: eight ranks hold them, one does not."""
    shape = Shape.of(MISTRAL_7B)
    setup = Setup(tokens=4096, full=True, rank=0, device="cuda")
    data = Data(learnt=1.0, length=1000)
    one, eight = (memory(shape, data, replace(setup, shards=ranks)) for ranks in (1, 8))
    assert one.weights == 8 * eight.weights == 4 * shape.parameters
    assert one.resident > 80 * GIB > eight.resident
    job = whole_job(tmp_path, config=tiny_config(vocab_size=32768, hidden_size=512))
    said = remedy(job.plan, job.store / "models/tiny", GIB)
    assert said.startswith("all weights with their gradients and moments take more than a rank's 1 GiB: use GPUs with ")
    assert said.endswith("raise spec.workers.replicas from 1, since ranks share them, or set spec.method.type to LoRA")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    crew = Crew(0, 1, None)
    saver = Saver(tmp_path, attempt=1, keep=2, facts=FACTS, crew=crew)
    saver.save(snapshot(3))
    assert saver.wait() is None
    with full_disk():
        saver.save(snapshot(6))
        assert isinstance(saver.wait(), OSError)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.a1"]
    assert newest_step(tmp_path) == 3


class Left(Crew):
    """Whose other ranks are killed when the leader has completed a checkpoint."""

    def gather(self, make: Callable[[], list[Any]]) -> list[Any]:
        found = super().gather(make)
        if isinstance(found[0], SavedCheckpoint):
            raise OSError("Connection reset by peer")
        return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_rank_that_is_killed_once_a_checkpoint_is_whole_does_not_cost_it(tmp_path: Path) -> None:
    saver = Saver(tmp_path, attempt=1, keep=2, facts=FACTS, crew=Left(0, 1, None))
    saver.save(snapshot(3))
    assert isinstance(saver.wait(), OSError)
    assert newest_step(tmp_path) == 3


def test_an_error_of_one_rank_is_one_of_all() -> None:
    def fail() -> list[int]:
        raise ValueError("no such file")

    assert Crew(0, 1, None).gather(lambda: [1, 2]) == [1, 2]
    with pytest.raises(OSError, match="rank 0: no such file"):
        Crew(0, 1, None).gather(fail)


def test_answers_are_written_by_all_ranks_together(tmp_path: Path) -> None:
    """Ranks that asked prompts of their own would wait for each other for ever."""
    talks(tmp_path)
    hyper = {"steps": 20, "learning_rate": 1e-2, "batch_tokens": 64, "scheduler": "Constant", "warmup_fraction": 0.0}
    job = train(whole_job(tmp_path, spec=TALK, hyper=hyper), 2)
    metrics = job.results()[0].metrics
    assert (metrics.task_score_before, metrics.task_score_after) == (0.0, 1.0)
    assert [one["model"] for one in generations(job)] == ["base", "base", "tuned", "tuned"]
