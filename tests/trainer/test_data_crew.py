"""Several processes make what one makes, in the same order; and none is left, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rooms import chats, write

from tuneward_api.conditions import Reason
from tuneward_api.names import ExitCode
from tuneward_trainer.data import build, samples
from tuneward_trainer.data import crew as crews
from tuneward_trainer.data.crew import crew
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Batch, Done, Limits, Source, Worker
from tuneward_trainer.report import ending

DEADLINE = 60.0


@pytest.fixture(scope="module")
def encoder(smollm2: Path) -> Encoder:
    from transformers import AutoTokenizer  # not above: a process that unpickles what is here would load it

    return Encoder(AutoTokenizer.from_pretrained(smollm2), "Assistant")


class Letters:
    """A tokenizer that is there at once."""

    def encode(self, values: Sequence[Any]) -> list[list[Encoded] | SampleError]:
        return [[Encoded.of([0] * 4, [0.0, 1.0, 1.0, 1.0])] for _ in values]


WORKER = Worker(Letters(), Limits(50))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_make_the_same_bytes_and_errors(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_RECORDS", 3)
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 60}]}
    file = write(tmp_path / "a.jsonl", [*chats(9), long, chats(1)[0], {"messages": []}, 3, *chats(20)[9:]])
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(build, "_processes", lambda _, count=processes: count)
        build.build(
            tmp_path / str(processes),
            training=[Source("pvc://data/a.jsonl", file, copies=2)],
            validation=[],
            encoder=encoder,
            limits=Limits(50, "Truncate", fraction=0.2, invalid=50),
        )
        found.append(files(tmp_path / str(processes)))
    assert found[0] == found[1]
    assert found[0]["errors.txt"].count(b"\n") == 2


def batch(*values: Any) -> Batch:
    return Batch([(line, json.dumps(value).encode()) for line, value in enumerate(values, 1)], "Text", {})


def test_what_is_broken_comes_behind_all_that_stands_before() -> None:
    def broken() -> Iterator[Batch]:
        yield from (batch({"text": f"number {index}"}) for index in range(9))
        raise SampleError("", "is cut", "a whole file")

    lengths = []
    with crew(WORKER, 2) as workers, pytest.raises(SampleError, match="is cut"):
        for _, done in workers.work(broken()):
            lengths.append([len(document) for good in done.good for document in good.documents])
    assert lengths == [[4]] * 9


def test_a_process_that_is_killed_ends_in_a_sentence() -> None:
    with crew(WORKER, 2) as workers:
        work = workers.work(batch({"text": f"number {index}"}) for index in range(99))
        next(work)
        os.kill(workers.members[0].id, signal.SIGKILL)
        _, end = ending(lambda: list(work))
    assert end is not None
    assert (end.code, end.reason, end.message) == (
        ExitCode.TRY_AGAIN,
        Reason.INFRASTRUCTURE,
        "a process that tokenizes was killed, perhaps for memory; give it more, or have less run beside it",
    )


def test_one_that_is_killed_before_it_was_asked_ends_in_the_same_sentence() -> None:
    with crew(WORKER, 2) as workers:
        for member in workers.members:
            os.kill(member.id, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="a process that tokenizes was killed, perhaps for memory"):
            list(workers.work(batch({"text": f"number {index}"}) for index in range(99)))


def test_another_takes_the_place_of_one_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "_PATIENCE", 5.0)
    with crew(WORKER, 2) as workers:
        work = workers.work(batch({"text": f"number {index}"}) for index in range(99))
        lines = [next(work)]
        stopped = [member.id for member in workers.members]
        for number in stopped:
            os.kill(number, signal.SIGSTOP)
        lines += work
        assert len(lines) == 99
        assert not any(alive(number) for number in stopped)


class Endless(Worker):
    def __call__(self, batch: Batch) -> Done:
        time.sleep(1000)
        return Done()


def test_where_the_next_one_stands_still_too_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "_PATIENCE", 3.0)
    with crew(Endless(Letters(), Limits(50)), 2) as workers:
        with pytest.raises(
            ChildProcessError, match=r"^two processes that tokenize made nothing of lines 1 to 1 in 3 s each; try"
        ):
            list(workers.work(batch({"text": f"number {index}"}) for index in range(9)))
        ids = [member.id for member in workers.members]
    assert not any(alive(number) for number in ids)


class Wrong(Worker):
    def __call__(self, batch: Batch) -> Done:
        raise RuntimeError(f"of line {batch.records[0][0]}")


def test_a_fault_of_ours_is_raised_with_its_place() -> None:
    with crew(Wrong(Letters(), Limits(50)), 2) as workers, pytest.raises(RuntimeError, match="of line 1") as caught:
        list(workers.work(iter([batch({"text": "x"})])))
    assert "in __call__" in caught.value.__notes__[0]


KILLED = """
import time
from tests.trainer.test_data_crew import WORKER, batch
from tuneward_trainer.data.crew import crew

if __name__ == "__main__":
    with crew(WORKER, 2) as workers:
        for _ in workers.work(batch({"text": "x"}) for _ in range(10**9)):
            print(*(member.id for member in workers.members), flush=True)
            time.sleep(1000)
"""


def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script)]
    quiet = subprocess.DEVNULL  # a tracker of resources tells of the death
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, env=environment, cwd=root) as process:
        assert process.stdout is not None
        ids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(ids) == 2
    deadline = time.monotonic() + DEADLINE
    while any(alive(number) for number in ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
