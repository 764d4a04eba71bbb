"""The preference loss: against TRL's trainer, against itself, and on any split of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests.trainer.jobs import TARGETS, VOCABULARY, make_model, make_pairs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tuneward_api.resolved import ResolvedMethod
from tuneward_trainer import evaluate, patches, reference
from tuneward_trainer.batch import Batch, collate
from tuneward_trainer.data.documents import TRAINING, Documents
from tuneward_trainer.distributed import Gang
from tuneward_trainer.engine import Engine, Output
from tuneward_trainer.losses import Preference
from tuneward_trainer.model import add_adapters, load_base, trainable

BETA = 0.3
ALONE = Gang(0, 1, torch.device("cpu"))


@dataclass
class Room:
    """A model whose adapter is not at its beginning, pairs, and the reference: the model without its adapter."""

    base: Path
    engine: Engine
    pairs: Documents
    loss: Preference


def adapted(base: Path) -> PeftModel:
    method = ResolvedMethod(
        type="LoRA", rank=4, alpha=8.0, dropout=0.0, rs_lora=False, target_modules=TARGETS, trainable_parameters=0
    )
    return add_adapters(load_base(base, torch.device("cpu")), method, seed=1, base_uri="")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("preference")
    model = adapted(make_model(folder / "model"))
    engine = Engine(model, weight_decay=0.0, max_grad_norm=1.0)
    pairs = Documents.open(make_pairs(folder / "data", training=4, copies=1) / TRAINING)
    indices = range(len(pairs))
    with patches.applied(model) as forward:
        start = evaluate.logprobs(forward, pairs, indices, ALONE, tokens=64, stopping=lambda: False)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    return Room(folder / "model", engine, pairs, Preference(BETA, start))


def batch_of(room: Room, *pairs: int) -> Batch:
    documents = [2 * pair + side for pair in pairs for side in (0, 1)]
    return collate((index, room.pairs[index]) for index in documents)


def run(
    room: Room, *batches: Batch, names: tuple[str, ...] = patches.ALL, scale: float = 1.0
) -> tuple[Output, torch.Tensor]:
    """(figures of all batches, gradient of their sum)."""
    with patches.applied(room.engine.model, names) as forward:
        outputs = [room.engine.forward_backward(forward, batch.scaled(scale), room.loss) for batch in batches]
    gradient = room.engine.gradient.clone()
    room.engine.gradient.zero_()
    return Output(torch.stack([output.figures for output in outputs]).sum(0), outputs[0].logprobs), gradient


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trl(room: Room, tmp_path: Path) -> None:
    """Its own trainer, from its own tokenization of the same pairs to the gradient of each tensor."""
    found, gradient = run(room, batch_of(room, 0, 1, 2, 3), scale=1 / 4)
    trainer = trl_trainer(room.pairs, adapted(room.base), tmp_path)
    theirs = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, parameter in trainable(room.engine.model).items():
            theirs[name].copy_(parameter)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    torch.autograd.backward(loss)
    expected = torch.cat([torch.as_tensor(theirs[name].grad).flatten() for name in trainable(room.engine.model)])
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    assert relative(gradient[: len(expected)], expected) < 1e-4
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    margin, accuracy = found.figures[1:].tolist()
    assert margin == pytest.approx(metrics["rewards/margins"], rel=1e-4)
    assert accuracy == pytest.approx(metrics["rewards/accuracies"])


def trl_trainer(pairs: Documents, model: Any, folder: Path) -> Any:
    """On the first four pairs. `model`: as it is before it has learnt anything, which is its reference. Words are numbers."""
    rows = []
    for pair in range(4):
        chosen, rejected = (pairs[2 * pair + side] for side in (0, 1))
        cut = int((chosen.weights == 0).sum())
        rows.append(
            {
                "prompt": words(chosen.ids[:cut]),
                "chosen": " " + words(chosen.ids[cut:]),
                "rejected": " " + words(rejected.ids[cut:]),
            }
        )
    vocabulary = {f"<{number}>": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = DPOConfig(
        str(folder), beta=BETA, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, max_length=None, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<2>", pad_token="<1>", unk_token="<0>"
        ),
    )
    trainer.model.eval()
    return trainer


def words(ids: Any) -> str:
    return " ".join(f"<{number}>" for number in ids.tolist())


def test_packed_equals_each_pair_alone_and_each_answer_alone(room: Room) -> None:
    packed, gradient = run(room, batch_of(room, 0, 1, 2, 3))
    apart, expected = run(room, *(batch_of(room, pair) for pair in range(4)))
    plain, without = run(room, batch_of(room, 0, 1, 2, 3), names=())
    for figures, other in ((apart.figures, expected), (plain.figures, without)):
        assert packed.figures.tolist() == pytest.approx(figures.tolist(), rel=1e-4)
        assert relative(gradient, other) < 1e-4


def test_the_reference_itself_is_indifferent(room: Room) -> None:
    """At step 0 every margin is 0, whatever the answers' lengths."""
    batch = batch_of(room, 0, 1)
    with torch.no_grad(), patches.applied(room.engine.model) as forward, room.engine.model.disable_adapter():
        loss, margin, _ = room.loss(forward(batch), batch).tolist()
    assert loss == pytest.approx(2 * math.log(2), rel=1e-5)
    assert abs(margin) < 1e-4


def test_a_batch_of_no_pair_has_no_loss(room: Room) -> None:
    output, gradient = run(room, collate([]))
    assert output.figures.tolist() == [0, 0, 0]
    assert not gradient.any()


def test_what_was_scored_before_a_stop_is_read_and_not_scored_again(room: Room, tmp_path: Path) -> None:
    place = reference.Place(run=tmp_path, attempt=1, identity={"base": "a"})
    scored: list[int] = []

    def measure(attempt: int, *, until: int = 99, identity: str = "a") -> torch.Tensor:
        place = reference.Place(run=tmp_path, attempt=attempt, identity={"base": identity})
        with patches.applied(room.engine.model) as forward:

            def counted(batch: Batch) -> torch.Tensor:
                scored.extend(batch.sources)
                return forward(batch)

            return reference.measure(
                counted, room.pairs, TRAINING, place, ALONE, row_tokens=32, stopping=lambda: len(scored) >= until, tokens=30
            )

    with pytest.raises(evaluate.StoppedError):
        measure(1, until=5)
    first = [entry.name for entry in sorted(place.folder.iterdir())]
    assert first
    assert all(name.endswith(".a1") for name in first)
    half, whole = len(scored), measure(2)
    assert len(scored) - half < len(room.pairs)
    scored.clear()
    (place.folder / first[0] / "MANIFEST.json").unlink()
    again = measure(3)
    assert torch.equal(again, whole)
    assert 0 < len(scored) < len(room.pairs)
    scored.clear()
    measure(4, identity="b")
    assert sorted(set(scored)) == list(range(len(room.pairs)))


def test_copies_are_scored_once(room: Room, tmp_path: Path) -> None:
    pairs = Documents.open(make_pairs(tmp_path / "data", training=2, copies=3) / TRAINING)
    place = reference.Place(run=tmp_path, attempt=1, identity={})
    with patches.applied(room.engine.model) as forward:
        found = reference.measure(forward, pairs, TRAINING, place, ALONE, row_tokens=64, stopping=lambda: False)
    assert found is not None
    assert len(found) == 8
    assert found[0::2].tolist() == [*[float(found[0])] * 3, float(found[6])]
    (folder,) = place.folder.iterdir()
    assert (folder / reference.FILE).stat().st_size == 4 * 8
