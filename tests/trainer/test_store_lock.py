"""One process at a time in a folder of the store, over pods and nodes: `alone`."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuneward_trainer import store
from tuneward_trainer.store import alone


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with alone(tmp_path / "model"):
            order.append("second")

    with alone(tmp_path / "model"):
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_owner_was_killed_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STALE_SECONDS", 0.1)
    (tmp_path / ".model.lock").write_text("somebody 3")
    with alone(tmp_path / "model"):
        assert not (tmp_path / ".model.lock").read_text().startswith("somebody")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be written: EFBIG stands for ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Beats(threading.Event):
    """Lets so many beats come, at once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def wait(self, timeout: float | None = None) -> bool:
        self.count -= 1
        return self.count < 0


def test_a_full_store_makes_nobody_think_that_the_owner_is_dead(tmp_path: Path) -> None:
    lock = tmp_path / ".model.lock"
    with alone(tmp_path / "model"):
        held = lock.read_text()
        token = held.split()[0]
        with full_disk():
            store._beat(lock, token, Beats(3))
        assert lock.read_text() == held
        store._beat(lock, token, Beats(1))
        assert lock.read_text() == f"{token} 00000001"
