"""Places told by added tokens: the same tokens and masks as by offsets, or none at all."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from tests.trainer.spaced import spaced
from tests.trainer.templates import templated
from tests.trainer.test_data_shapes import conversation
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import ids_of
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.marks import Marks, Tails
from tuneward_trainer.data.plans import Places
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.render import Rendered
from tuneward_trainer.data.shapes import Frame

END = "<|im_end|>"
WORDS = ["Hi", " there", "\n", END, "<|im_", "|>", "日本", " ", "<|endoftext|>", "e\u0301", "don't", "   ", "<|im_start|>"]


def said(dice: random.Random, count: int = 4) -> str:
    return "".join(dice.choices(WORDS, k=count))


@pytest.mark.parametrize("name", ["llama3_1", "phi3", "qwen3", "qwen2_5", "qwen3_5_think", "gemma3"])
def test_places_by_marks_are_those_by_offsets(plain: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = templated(plain if name != "gemma3" else spaced(), name)
    quick = Encoder(tokenizer, "Assistant")
    monkeypatch.setattr(Marks, "of", lambda *_: None)
    by_offsets = Encoder(tokenizer, "Assistant")
    assert quick._marks is not None and by_offsets._marks is None
    dice = random.Random(name)
    chats = [conversation(dice) for _ in range(12)]
    chats += [formats.Chat([{"role": r, "content": said(dice)} for r in ("user", "assistant")], [0, 1]) for _ in range(30)]
    texts: list[Any] = [*chats, *(formats.Text(said(dice, 9)) for _ in range(30)), formats.PromptCompletion("a ", "b")]
    for ours, theirs in zip(quick.encode(texts), by_offsets.encode(texts), strict=True):
        assert str(ours) == str(theirs) if isinstance(ours, SampleError) else ours == theirs


ADDED = {1: "<|s|>", 2: "<|e|>", 3: "<|x|>"}
LETTERS = {"a": 10, "b": 11, "c": 12, "d": 13, " ": 14, "<": 15, "|": 16, ">": 17, "ab": 20}


def letters(text: str) -> list[int]:
    """A letter is a token, but "ab" is one together."""
    return [LETTERS[part] for part in re.findall("ab|.", text)]


@pytest.mark.parametrize(
    ("text", "span", "ids", "expected"),
    [
        ("<|s|>a<|e|>", (5, 11), [1, 10, 2], ([1, 3], True)),
        ("<|s|>ca<|e|>d", (6, 12), [1, 12, 10, 2, 13], ([2, 4], True)),
        ("<|s|>a<|e|><|x|>", (5, 16), [1, 10, 2, 3], ([1, 3], True)),
        ("<|s|>a<|x|><|x|>", (5, 16), [1, 10, 3, 3], ([1, 4], True)),
        ("<|s|>a<|e|>b", (5, 12), [1, 10, 2, 11], ([1, 4], False)),
        ("<|s|>ab<|e|>", (6, 12), [1, 20, 2], None),
        ("ca<|e|>", (1, 7), [12, 10, 2], None),
        ("<|s|>a<|e|>", (7, 11), [1, 10, 2], None),
        ("<|s|>a<|e|>", (5, 11), [1, 10], None),
    ],
    ids=["whole", "behind a role", "first stop", "last special", "no end", "token across", "no mark", "in a mark", "lost"],
)
def test_places(text: str, span: tuple[int, int], ids: list[int], expected: tuple[list[int], bool] | None) -> None:
    marks = Marks(ADDED, {2}, {1, 2, 3}, Tails(letters))
    places = Places([expected[0]], [expected[1]]) if expected else None
    assert marks.places(Rendered(text, (span,)), ids_of(ids)) == places


def tokens(text: str) -> list[int]:
    """Cut at the added tokens first."""
    ids = {token: number for number, token in ADDED.items()}
    parts = [part for part in re.split(r"(<\|[sex]\|>)", text) if part]
    return [number for part in parts for number in ([ids[part]] if part in ids else letters(part))]


@pytest.mark.parametrize(
    ("around", "learnt", "texts", "told"),
    [
        (("<|s|>", "<|e|>"), [(0, 0, 5)], ["a"], True),
        (("<|s|>c", "<|e|><|s|>d", "<|e|>"), [(1, 1, 5)], ["ab", "ba"], True),
        (("<|s|>c", "<|e|> <|x|>d<|s|>d", "<|e|><|x|>"), [(0, 0, 11), (1, 6, 10)], ["a", "d"], True),
        (("<|s|>c", "<|e|>dd<|s|>", "<|x|><|x|>"), [(0, 0, 6), (1, 0, 10)], ["a", "d"], True),
        (("<|s|>c", "<|x|><|e|><|e|><|x|><|s|>", ""), [(0, 0, 20)], ["a", "d"], False),
        (("<|s|>c", "<|x|><|e|><|e|><|x|>"), [(0, 0, 20)], ["a"], True),
        (("<|s|>a", "<|e|>"), [(0, 0, 5)], ["b"], False),
        (("<|s|>", "<|e|>"), [(0, 0, 5)], ["a<|x|>b"], False),
        (("c<|", "<|e|>"), [(0, 0, 5)], ["s|>a"], False),
        (("<|s|>", "|>c<|e|>"), [(0, 0, 8)], ["a<|x"], False),
        (("c", "<|e|>"), [(0, 0, 5)], ["a"], False),
        (("<|s|>", "d<|e|>", "<|e|>"), [(0, 0, 1), (1, 0, 5)], ["a", "a"], True),
    ],
)
def test_a_plan_tells_what_the_text_tells(
    around: tuple[str, ...], learnt: list[tuple[int, int, int]], texts: list[str], told: bool
) -> None:
    marks = Marks(ADDED, {2}, {1, 2, 3}, Tails(letters))
    frame = Frame(around, tuple(learnt))
    text, spans = frame.rendered(texts), frame.spans(texts)
    ids = ids_of(tokens(text))
    expected = marks.places(Rendered(text, spans), ids)
    assert marks.places(Rendered(text, spans, frame=frame), ids) == expected
    plan = marks._plan(frame)
    found = plan.places(ids, np.flatnonzero(np.isin(ids, list(ADDED)))) if plan else None
    assert found == (expected if told else None)


class _Wrapped:
    """What is asked of transformers' tokenizers."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend
        self.added_tokens_decoder = backend.get_added_tokens_decoder()


@pytest.mark.parametrize("change", ["nothing", "prefix", "normalizer", "no bytes", "strips", "composes", "spaced"])
def test_which_tokenizers_are_read_so(change: str) -> None:
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=change == "prefix")
    if change == "no bytes":
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    if change == "composes":
        backend.normalizer = normalizers.NFC()
    if change == "spaced":
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.Replace(" ", "▁"),
            pre_tokenizers.Split(" ", "merged_with_previous"),
        )
    backend.add_special_tokens([AddedToken(END, rstrip=change == "strips")])
    found = Marks.of(_Wrapped(backend), {0}, Tails(lambda text: []))
    assert (found is not None) == (change in ("nothing", "composes", "spaced"))
    if found is not None:
        assert found.places(Rendered(f"e\u0301{END}", ((0, 12),)), ids_of([1, 0])) == (
            Places([[0, 2]], [True]) if change != "composes" else None
        )
