"""A cache takes from earlier ones what they hold of its samples, and is the same to the byte as if there were none."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.rooms import Room, chats, write
from transformers import AutoTokenizer

from tuneward_trainer.data import build, samples
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.earlier import Addresses, Earlier
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.formats import Sample
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Limits, Source

LONG = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 60}]}
PAIRS = [{"prompt": f"Question {n}", "chosen": f"Right {n}", "rejected": f"Wrong {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


class Counted:
    """The encoder, and how many samples it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.given = 0
        self._encoder = Encoder(tokenizer, "Assistant")

    def encode(self, values: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        self.given += len(values)
        return self._encoder.encode(values)


def built(folder: Path, tokenizer: Any, sources: list[Source], limits: Limits, earlier: Earlier | None = None) -> int:
    """Samples that were rendered and tokenized."""
    encoder = Counted(tokenizer)
    build.build(folder, training=sources, validation=[], encoder=encoder, limits=limits, earlier=earlier)
    return encoder.given


def parts(folder: Path) -> Earlier:
    return Earlier([folder / "training", folder / "validation"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def source(path: Path, values: list[Any], **how: Any) -> Source:
    return Source(f"pvc://data/{path.name}", write(path, values), **how)


@pytest.mark.parametrize(
    ("before", "after", "limits", "new"),
    [
        pytest.param(chats(9), [*chats(9), *chats(12)[9:]], Limits(50), 3, id="lines were added"),
        pytest.param(chats(9), chats(9)[::-1], Limits(50, fraction=0.3), 0, id="another order, some are held out"),
        pytest.param([*chats(3), LONG], [LONG, *chats(3)], Limits(50, "Truncate"), 1, id="one is cut"),
        pytest.param([*chats(3), LONG], [LONG, *chats(3)], Limits(50, "Skip"), 1, id="one is left out"),
        pytest.param([{**chats(1)[0], "id": 7}], [{**chats(1)[0], "id": 7}] * 2, Limits(50), 0, id="a field is ignored"),
        pytest.param([*chats(4), 3, {"messages": []}], [3, *chats(4)], Limits(50, invalid=50), 0, id="some are invalid"),
        pytest.param(PAIRS, [*PAIRS[::2], *PAIRS[1::2]], Limits(99, fraction=0.25, objective="DPO"), 0, id="pairs"),
        pytest.param([{"text": "a b " * 40}], [{"text": "a b " * 40}], Limits(50, "Split"), 1, id="one is split"),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_what_is_known_is_copied(
    tmp_path: Path, tokenizer: Any, before: list[Any], after: list[Any], limits: Limits, new: int, copies: int
) -> None:
    built(tmp_path / "earlier", tokenizer, [source(tmp_path / "a.jsonl", before, copies=copies)], limits)
    sources = [source(tmp_path / "b.jsonl", after)]
    built(tmp_path / "alone", tokenizer, sources, limits)
    assert built(tmp_path / "grown", tokenizer, sources, limits, parts(tmp_path / "earlier")) == new
    assert files(tmp_path / "grown") == files(tmp_path / "alone")


def test_a_sample_that_is_now_too_long_is_looked_at_again(tmp_path: Path, tokenizer: Any) -> None:
    sources = [source(tmp_path / "a.jsonl", [*chats(3), LONG])]
    built(tmp_path / "earlier", tokenizer, sources, Limits(200))
    shorter = Limits(50, "Truncate")
    built(tmp_path / "alone", tokenizer, sources, shorter)
    assert built(tmp_path / "grown", tokenizer, sources, shorter, parts(tmp_path / "earlier")) == 1
    assert files(tmp_path / "grown") == files(tmp_path / "alone")


def test_several_processes_find_them_too(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tokenizer, "Assistant")

    def made(folder: str, earlier: Earlier | None) -> dict[str, bytes]:
        build.build(tmp_path / folder, training=sources, validation=[], encoder=encoder, limits=Limits(50), earlier=earlier)
        return files(tmp_path / folder)

    sources = [source(tmp_path / "a.jsonl", chats(12))]
    alone = made("alone", None)
    monkeypatch.setattr(samples, "_RECORDS", 3)
    monkeypatch.setattr(build, "WORTH", 0)
    monkeypatch.setattr(build, "processors", lambda: 2)
    assert made("grown", parts(tmp_path / "alone")) == alone


def test_what_is_gone_or_broken_is_made_again(tmp_path: Path, tokenizer: Any) -> None:
    sources = [source(tmp_path / "a.jsonl", chats(3))]
    built(tmp_path / "earlier", tokenizer, sources, Limits(50))
    (tmp_path / "earlier/training/starts.i64").unlink()
    assert built(tmp_path / "grown", tokenizer, sources, Limits(50), parts(tmp_path / "earlier")) == 3
    assert built(tmp_path / "again", tokenizer, sources, Limits(50), parts(tmp_path / "nowhere")) == 3


def test_an_address_is_of_the_content_and_of_how_it_is_read() -> None:
    ways = [Addresses(None, {}), Addresses("Text", {}), Addresses("Text", {"body": "text"})]
    contents: list[Any] = [b'{"text": "a"}', b'{"text": "b"}', {"text": "a"}, {"text": "b"}]
    found = [way.of(content) for way in ways for content in contents]
    assert len(set(found)) == len(found)
    assert found == [way.of(content) for way in ways for content in contents]


def test_prepare_tokenizes_what_was_added(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    encode = Encoder.encode

    def count(encoder: Encoder, values: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        given.append(len(values))
        return encode(encoder, values)

    monkeypatch.setattr(Encoder, "encode", count)
    assert room.run()[0] == 0
    write(room.data, chats(23))
    assert room.run()[0] == 0
    # Other tokens are learnt: another encoding.
    room.request["spec"]["datasets"]["lossOn"] = "All"
    assert room.run()[0] == 0
    assert sum(given[:-1]) == 23 and given[-1] == 23
    caches = list((room.root / "store/data").glob("sha256-*"))
    assert len(caches) == 3
    # An earlier one may be removed.
    for cache in caches:
        shutil.rmtree(cache)
    assert room.run()[0] == 0
    assert given[-1] == 23
