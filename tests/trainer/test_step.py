"""A step's numbers come to the host in one copy; where they are read while the next step runs, nothing else is different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.jobs import Job, await_, make_job
from tests.trainer.sessions import losses

from tuneward_trainer import attention, patches
from tuneward_trainer.data.documents import TRAINING
from tuneward_trainer.endings import DivergedError
from tuneward_trainer.feed import AHEAD, Feed, MicroBatch, Outline, outlined
from tuneward_trainer.progress import Clock
from tuneward_trainer.session import Session, conclude
from tuneward_trainer.step import Arrival
from tuneward_trainer.train import one_step, train

CPU = torch.device("cpu")


def ended(session: Session) -> Session:
    train(session)
    conclude(session, seconds=0)
    return session


def test_running_ahead_changes_no_byte_and_no_figure(tmp_path: Path, begun: Callable[..., Session]) -> None:
    """Dropout, so that a micro-batch of the next step must not disturb what is left of this one; evaluations between."""
    asked = {"checkpoint": {"everySteps": 3}, "evaluation": {"everySteps": 4}}
    job = make_job(tmp_path, method={"dropout": 0.1}, hyper={"steps": 7}, spec=asked)
    ended(begun(job, ahead=False))
    other = job.again("ahead")
    ended(begun(other, ahead=True))
    assert other.adapter() == job.adapter()
    assert losses(other) == losses(job)
    assert len(losses(job)) == 7


def test_a_stop_that_is_read_late_ends_with_the_same_step(tmp_path: Path, begun: Callable[..., Session]) -> None:
    whole = make_job(tmp_path, hyper={"steps": 7})
    ended(begun(whole, ahead=False))
    for ahead in (False, True):
        job = whole.again(f"stopped-{ahead}")
        session = ended(begun(job, ahead=ahead, stop_at=4))
        (result,) = job.results()
        assert (session.engine.step, result.outcome, result.step) == (5, "Stopped", 5)
        assert result.checkpoint is not None
        assert result.checkpoint.step == 5
        ended(begun(job, ahead=ahead))
        assert job.adapter() == whole.adapter()


def test_a_loss_that_is_not_finite_is_the_same_sentence_and_leaves_no_state(
    tmp_path: Path, begun: Callable[..., Session]
) -> None:
    job = make_job(tmp_path, spec={"checkpoint": {"everySteps": 1}})
    weights = job.store / "data/tiny" / TRAINING / "weights.f16"
    content = bytearray(weights.read_bytes())
    # Infinity in float16, as the weight of the first document's second token.
    content[2:4] = b"\x00\x7c"
    weights.write_bytes(bytes(content))
    said = []
    for ahead in (False, True):
        one = job.again(f"ahead-{ahead}")
        session = begun(one, ahead=ahead)
        with pytest.raises(DivergedError, match=r"not finite at step \d+ \(sample pvc://claim/chats\.jsonl:1\)") as error:
            train(session)
        said.append(str(error.value))
        bad = int(str(error.value).split("at step ")[1].split()[0]) - 1
        assert [step for step in saved_steps(one) if step >= bad] == []
    assert said[0] == said[1]


def saved_steps(job: Job) -> list[int]:
    return [int(folder.name[5:13]) for folder in (job.run / "checkpoints").glob("step-*")]


WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
"""What of a GPU's tensor makes the host wait."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all that are called, as they come, and `to cpu`."""
    seen: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return real(self, *arguments, **named)

        return call

    move = torch.Tensor.to

    def to(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if arguments and str(arguments[0]) == "cpu":
            seen.append("to cpu")
        return move(self, *arguments, **named)

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(torch.Tensor, "to", to)
    return seen


@pytest.fixture
def attention_unseen(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's attention in packed rows asks for their lengths; a GPU's does not (test_fake_gpu.py)."""
    real = attention.packed_attention

    def attend(*arguments: Any, **named: Any) -> Any:
        before = len(waits)
        found = real(*arguments, **named)
        del waits[before:]
        return found

    monkeypatch.setattr(patches, "packed_attention", attend)


@pytest.mark.usefixtures("attention_unseen")
def test_a_step_asks_the_device_for_its_numbers_once_and_late(
    tmp_path: Path, begun: Callable[..., Session], waits: list[str]
) -> None:
    session = begun(make_job(tmp_path), ahead=True)
    engine = session.engine
    # As on a GPU: a CPU's own asks for the number of its step.
    engine._optimizer = torch.optim.AdamW([engine._flat], lr=0.0, fused=True)  # type: ignore[union-attr]
    clock, done = Clock(12), None
    with patches.applied(engine.model) as forward, Feed.of(session) as feed:
        for step in range(3):
            waits.clear()
            done = one_step(session, forward, feed, clock, done)
            # Of the step before, whose copy has come meanwhile; and this one's copy, that nobody has read.
            assert waits == (["tolist", "to cpu"] if step else ["to cpu"])


def test_numbers_arrive_as_they_were() -> None:
    numbers = torch.tensor([1.5, -0.0, float("inf")])
    assert Arrival(numbers).read() == numbers.tolist()


# -- the feed ------------------------------------------------------------------------------------------------------------


def test_micro_batches_are_ready_across_the_end_of_a_step(tmp_path: Path, begun: Callable[..., Session]) -> None:
    session = begun(make_job(tmp_path), ahead=False)
    wanted = [item for step in range(3) for item in outlined(session, step)]
    made: list[Outline | MicroBatch] = []

    def watched() -> Iterator[Outline | MicroBatch]:
        for item in wanted:
            made.append(item)
            yield item

    first = wanted[0]
    assert isinstance(first, Outline)
    with Feed(watched(), CPU) as feed:
        assert feed.outline() == first
        for _ in first.places:
            feed.micro_batch()
        # Nobody has asked for the next step, and it is begun: AHEAD are ready, and one more is at hand.
        count = 1 + len(first.places) + AHEAD + 1
        await_(lambda: len(made) >= count)
        assert len(made) == count
        assert feed.outline() == wanted[1 + len(first.places)]


def test_what_goes_wrong_with_data_is_raised_where_it_is_used() -> None:
    def broken() -> Iterator[Outline | MicroBatch]:
        yield Outline(0, 1, range(1), 8)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"), Feed(broken(), CPU) as feed:
        assert feed.outline().tokens == 8
        feed.micro_batch()
