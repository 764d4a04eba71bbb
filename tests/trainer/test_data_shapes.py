"""Conversations that are rendered once: the same tokens and masks as by rendering every beginning, on every template."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
from tests.trainer.templates import NAMES, templated

from tuneward_trainer.data import encode, formats, shapes, templates
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.shapes import Shape, Shapes, minded

WORDS = [
    "Hi",
    "two  spaces",
    "a\nb",
    "日本",
    "<b>",
    "don't",
    "</think>",
    "[INST]",
    " edge",
    "end\n",
    "<think>\nx</think>y",
    "",
    "{{ x }}",
]


def conversation(dice: random.Random) -> formats.Chat:
    plain = dice.random() < 0.7
    roles = ["system"] * dice.randint(0, 1) + ["user", "assistant"] * dice.choice([1, 2, 3, 25])
    if dice.random() < 0.2:
        roles[dice.randrange(len(roles))] = "user"
    messages, weights = [], []
    for role in roles:
        text = (
            "".join(dice.choices(WORDS[:6] if plain else WORDS, k=3)).strip() if plain else "".join(dice.choices(WORDS, k=2))
        )
        messages.append({"role": role, "content": text})
        weights.append(int(role == "assistant" and dice.random() < 0.8))
    return formats.Chat(messages, weights)


@pytest.mark.parametrize("name", NAMES)
def test_the_quick_way_gives_what_the_long_way_gives(plain: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = templated(plain, name)
    quick = Encoder(tokenizer, "Assistant")
    monkeypatch.setattr(encode, "quick_template", lambda _: None)
    long = Encoder(tokenizer, "Assistant")
    dice = random.Random(name)
    for _ in range(7):
        chats = [conversation(dice)]
        ours, theirs = quick.encode(chats)[0], long.encode(chats)[0]
        assert str(ours) == str(theirs) if isinstance(ours, SampleError) else ours == theirs


def test_a_row_of_roles_is_rendered_and_its_conversations_are_not(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    real = templates.quick_template

    def counted(tokenizer: Any) -> shapes.Quick:
        render = real(tokenizer)
        assert render is not None

        def count(messages: shapes.Messages, prompt: bool) -> str | None:
            rendered.append(len(messages))
            return render(messages, prompt)

        return count

    monkeypatch.setattr(encode, "quick_template", counted)
    encoder = Encoder(templated(plain, "llama3"), "Assistant")
    turns = [{"role": role, "content": f"text {index}"} for index in range(40) for role in ("user", "assistant")]
    encoder.encode([formats.Chat(turns, [0, 1] * 40)])
    assert rendered == [32, 80, 79], "the row that is proved; that its texts are copied, also to the last prompt"
    del rendered[:]
    encoder.encode([formats.Chat(turns[: 2 * count], [0, 1] * count) for count in (1, 9, 16, 20)])
    assert rendered == [2, 18, 32, 40, 39]
    del rendered[:]
    encoder.encode([formats.Chat(turns[: 2 * count], [0, 1] * count) for count in (40, 1, 9, 16, 20)])
    assert rendered == []


def test_another_process_reads_the_tokenizer_for_what_is_not_plain_only(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    real = templates.Held.__call__

    def noting(held: templates.Held) -> Any:
        read.append(held._pickled)
        return real(held)

    here = Encoder(templated(plain, "qwen2_5"), "Assistant")
    there = pickle.loads(pickle.dumps(here))
    monkeypatch.setattr(templates.Held, "__call__", noting)
    turns = [{"role": role, "content": f"text {index}"} for index in range(40) for role in ("user", "assistant")]
    chats: list[formats.Sample] = [formats.Chat(turns[: 2 * count], [0, 1] * count) for count in (1, 40)]
    chats += [formats.Text("a"), formats.PromptCompletion("a", "b")]
    assert there.encode(chats) == here.encode(chats)
    assert not read
    spaced: list[formats.Sample] = [formats.PromptCompletion(" a", "b")]
    assert there.encode(spaced) == here.encode(spaced)
    assert read[0]


def test_a_row_of_roles_that_never_comes_again_is_proved_a_few_times_only() -> None:
    proofs = []

    def prove(messages: list[dict[str, Any]]) -> None:
        proofs.append(messages)

    found = Shapes(lambda messages, prompt: "", prove, "")
    for index in range(50):
        roles = [("user", "system")[index >> bit & 1] for bit in range(6)]
        messages = [{"role": role, "content": "a"} for role in (*roles, "assistant")]
        assert found.find(messages, [6]) is None
    assert len(proofs) in (17, 18)


@pytest.mark.parametrize(
    ("texts", "whole", "spans", "expected"),
    [
        (["a", "b"], "<a|b>.", {1: (3, 5)}, Shape(["<", "|", ">."], {1: (0, 1)})),
        (["a", "b"], "<a|b>.", {1: (2, 6)}, Shape(["<", "|", ">."], {1: (1, 2)})),
        (["a", "b"], "<a|b>a", {1: (3, 5)}, None),
        (["a", "b"], "<b|a>", {1: (1, 2)}, None),
        (["a", "b"], "<a|b>", {1: (1, 5)}, None),
        (["a", "b"], "<a|b>", {1: (4, 5)}, None),
    ],
    ids=["bare", "with what is around", "twice", "out of order", "over another text", "without its text"],
)
def test_what_stands_around_texts(texts: list[str], whole: str, spans: Any, expected: Shape | None) -> None:
    assert Shape.of(texts, whole, spans) == expected


def test_a_row_goes_on_in_pairs_once_it_has_settled() -> None:
    around = ["S", "U", "A", "/U", "A", "/U", "A", "/"]
    shape = Shape(around, {2: (1, 1), 4: (1, 1), 6: (1, 1)})
    assert shape.settled
    assert not Shape(["S", *around[1:4], "B", *around[5:]], shape.learnt).settled or around[4] == "B"
    longer = shape.continued(9).beginning(9)
    assert longer == Shape([*around[:7], "/U", "A", "/"], {2: (1, 1), 4: (1, 1), 6: (1, 1), 8: (1, 1)}, foretold=True)
    texts = list("susususus")
    assert longer.rendered(texts)[slice(*longer.frame([8]).spans(texts)[0])] == "As/"


def test_marks_that_a_template_minds() -> None:
    source = "{% if '</think>' in m.content %}{{ '<|im_start|>' + m.role + \"[x]\" }}<not code>{% endif %}{{ 'user' }}"
    assert minded(source) == ["</think>", "<|im_start|>", "[x]"]
