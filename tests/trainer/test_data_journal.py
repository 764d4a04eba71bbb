"""A pass over files that is killed goes on where it was, and gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.support.wait import wait_for
from tests.trainer.rooms import chats, write
from transformers import AutoTokenizer

from tuneward_trainer.data import build, journal, samples
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.samples import Batch, Done, Limits, Source, Worker

LONG = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 60}]}


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(smollm2), "Assistant")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def given(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three files of 13 batches; a journal after each."""
    monkeypatch.setattr(samples, "_RECORDS", 3)
    monkeypatch.setattr(build, "_SAVE_EVERY", 0.0)
    write(tmp_path / "in/a.jsonl", [*chats(9), {"messages": []}, LONG])
    write(tmp_path / "in/b.jsonl", [{**chats(1)[0], "id": 1}, *chats(12)])
    write(tmp_path / "held.jsonl", [*chats(9), {"messages": []}])
    return {
        "training": [Source("pvc://data/in", tmp_path / "in", copies=2)],
        "validation": [Source("pvc://data/held.jsonl", tmp_path / "held.jsonl")],
        "encoder": encoder,
        "limits": Limits(50, "Truncate", invalid=50),
    }


# Newer Pythons warn of forks where there are threads; the child only tokenizes.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("killed_at", [1, 2, 4, 5, 8, 10, 12])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = build.build(tmp_path / "whole", **given)
    made: list[Batch] = []
    real = Worker.__call__

    def count(worker: Worker, batch: Batch) -> Done:
        made.append(batch)
        if len(made) == killed_at and os.getpid() != ours:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(worker, batch)

    ours = os.getpid()
    monkeypatch.setattr(Worker, "__call__", count)
    child = os.fork()
    if child == 0:
        build.build(tmp_path / "killed", **given)
        os._exit(0)
    try:
        ended = wait_for(lambda: found if (found := os.waitpid(child, os.WNOHANG))[0] else None, what="the child's end")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise
    assert ended[1] == signal.SIGKILL
    assert (tmp_path / "killed" / journal.JOURNAL).exists() == (killed_at > 1)
    assert build.build(tmp_path / "killed", **given) == whole
    assert len(made) == 13 - (killed_at - 1)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "not JSON", "of another version"])
def test_a_journal_that_does_not_hold_is_not_followed(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole = build.build(tmp_path / "whole", **given)
    monkeypatch.setattr(journal, "remove", lambda folder: None)
    build.build(tmp_path / "out", **given)
    monkeypatch.undo()
    file = tmp_path / "out" / journal.JOURNAL
    if damage == "cut":
        (tmp_path / "out/validation/ids.i32").write_bytes(b"")
    elif damage == "not JSON":
        file.write_text("{")
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), "summary": {"sources": [], "mood": "good"}}))
    assert build.build(tmp_path / "out", **given) == whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")
