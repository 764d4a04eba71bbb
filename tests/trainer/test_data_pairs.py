"""Pairs as TRL and OpenAI write them: what is learnt of each side, what is refused, and that pairs stay pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.test_data_masks import APPENDS, STRIPS_REASONING, encoder, show, templated
from transformers import AutoTokenizer

from tuneward_trainer.data import formats, pairs
from tuneward_trainer.data.build import DataError, build
from tuneward_trainer.data.documents import Documents
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.gathered import Summary
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.samples import Limits, Source


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def said(*contents: str) -> list[dict[str, str]]:
    return turns(*contents, first="assistant")


def openai(better: Any = None, worse: Any = None, **given: Any) -> dict[str, Any]:
    given = {"messages": turns("Hi")} | given
    return {"input": given, "preferred_output": better or said("Yes"), "non_preferred_output": worse or said("No")}


def read(value: dict[str, Any]) -> pairs.Sample:
    return pairs.read(value, formats.detect(value))


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
FORMS = {
    "three lists": {"prompt": turns("Hi"), "chosen": said("Yes"), "rejected": said("No")},
    "two conversations": {"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")},
    "two conversations and their prompt as a text": {
        "prompt": "Hi", "chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No"), "messages": turns("Hi", "Yes"),
    },
    "two conversations and their prompt": {"prompt": turns("Hi"), "chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")},
    "a text and two lists": {"prompt": "Hi", "chosen": said("Yes"), "rejected": said("No")},
    "three texts": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "OpenAI's": openai(),
}  # fmt: skip


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS)
def test_every_form_is_one_prompt_and_two_learnt_answers(tokenizer: Any, value: dict[str, Any]) -> None:
    sample = read(value)
    found = encoder(tokenizer, APPENDS).encode(list(pairs.sides(sample)))
    assert [show(tokenizer, document) for document in pairs.joined(sample, found)] == [
        [(False, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), (True, f"{answer}<|im_end|>")]
        for answer in ("Yes", "No")
    ]


def test_turns_that_both_share_are_not_learnt(tokenizer: Any) -> None:
    """And of what differs every turn of assistant is."""
    sample = read({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e", "f", "g")})
    found = encoder(tokenizer, APPENDS).encode(list(pairs.sides(sample)))
    learnt = [[text for learns, text in show(tokenizer, one) if learns] for one in pairs.joined(sample, found)]
    assert learnt == [["d<|im_end|>"], ["e<|im_end|>", "g<|im_end|>"]]


def test_without_a_template_texts_are_joined_as_they_are(tokenizer: Any) -> None:
    sample = read({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
    found = encoder(tokenizer, "").encode(list(pairs.sides(sample)))
    documents = pairs.joined(sample, found)
    assert [show(tokenizer, document) for document in documents] == [
        [(False, "1 + 1 ="), (True, f"{answer}<|im_end|>")] for answer in (" 2", " 3")
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"chosen": "a", "rejected": "b"}, "prompt is missing; allowed: a text; only lists of messages may begin with the prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty; allowed: a text"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, 'rejected is " ": no answer; allowed: a text'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected is the same as chosen; allowed: two answers that differ"),
        ({"prompt": "a", "chosen": "b", "rejected": said("c")}, 'rejected is [{"role": "assistant", "content": "c"}]; allowed: two texts'),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is 3; allowed: a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "tools would not be learnt from"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "system would not be learnt from; allowed: only chosen"),
        ({"prompt": turns("a"), "chosen": said("b"), "rejected": said("b")}, "rejected is the same as chosen"),
        ({"prompt": turns("a"), "chosen": said("b"), "rejected": said(" ")}, 'rejected[0].content is " ": the model would learn'),
        ({"prompt": turns("a"), "chosen": said("b"), "rejected": []}, "rejected is []; allowed: a list of at least one message"),
        ({"chosen": said("b"), "rejected": said("c")}, "prompt is missing; allowed: a prompt, here or at the beginning of both"),
        ({"chosen": turns("a", "b"), "rejected": turns("x", "b")}, "rejected[0] is not the prompt of chosen; allowed: the same prompt"),
        ({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "x", "d")}, "rejected[2] is not the prompt of chosen"),
        ({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b")}, "rejected has no answer of its own: chosen only goes on"),
        ({"prompt": "z", "chosen": turns("a", "b"), "rejected": turns("a", "c")}, "chosen does not hold what prompt says"),
        (openai(messages=[]), "input.messages is []; allowed: a list of at least one message"),
        (openai(tools="{"), "input.tools is no JSON"),
        (openai(temperature=1), "input.temperature would not be learnt from; allowed: only messages, tools"),
        (openai() | {"input": "Hi"}, 'input is "Hi"; allowed: an object with messages'),
        (openai(better=turns("a", "b")), 'preferred_output[0].role is "user"; allowed: assistant'),
        (openai(worse=said("Yes")), "non_preferred_output is the same as preferred_output"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_learnt_from(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        read(value)
    assert str(caught.value).startswith(expected)


def test_answers_that_a_template_makes_equal_or_cuts_up_are_refused(tokenizer: Any) -> None:
    trims = APPENDS.replace("m['content']", "m['content'].strip()")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (trims, {"prompt": "a", "chosen": "b", "rejected": "b "}, "rejected gives the same tokens as chosen"),
        (
            STRIPS_REASONING,
            {
                "prompt": turns("a"),
                "chosen": [said("b")[0] | {"reasoning_content": "r"}, *turns("c", "d")],
                "rejected": said("e"),
            },
            "chosen has several turns of assistant, and the chat template changes earlier ones; allowed: answers of one turn",
        ),
    ]
    for template, value, expected in cases:
        sample = read(value)
        found = Encoder(templated(tokenizer, template), "Assistant").encode(list(pairs.sides(sample)))
        with pytest.raises(SampleError) as caught:
            pairs.joined(sample, found)
        assert str(caught.value).startswith(expected)


# -- over files ------------------------------------------------------------------------------------------------------------


def source(path: Path, *values: dict[str, Any], **fields: Any) -> Source:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return Source(f"pvc://data/{path.name}", path, **fields)


def text_pair(number: int, *, words: int = 1) -> dict[str, str]:
    return {"prompt": f"Question {number}", "chosen": f"Right {number}" + " yes" * words, "rejected": f"Wrong {number}"}


def built(tmp_path: Path, tokenizer: Any, limits: Limits, *sources: Source) -> Summary:
    return build(tmp_path / "out", training=sources, validation=[], encoder=Encoder(tokenizer, "Assistant"), limits=limits)


def sides_of(tokenizer: Any, documents: Documents) -> list[tuple[str, str]]:
    """(chosen, rejected), what is learnt of them."""
    learnt = [tokenizer.decode(document.ids[document.weights > 0].tolist()) for document in documents]
    return list(zip(learnt[::2], learnt[1::2], strict=True))


def test_copies_and_held_out_pairs_stay_pairs(tmp_path: Path, tokenizer: Any) -> None:
    values = [text_pair(number) for number in range(12)]
    limits = Limits(99, fraction=0.25, objective="DPO")
    summary = built(tmp_path, tokenizer, limits, source(tmp_path / "a.jsonl", *values, copies=2))
    training, validation = (Documents.open(tmp_path / "out" / part) for part in ("training", "validation"))
    expected = [(f"Right {n} yes<|im_end|>", f"Wrong {n}<|im_end|>") for n in range(12)]
    kept, held = sides_of(tokenizer, training), sides_of(tokenizer, validation)
    assert sorted([*kept[::2], *held]) == sorted(expected)
    assert kept[::2] == kept[1::2]
    assert len(held) == 3
    assert (summary.samples, summary.documents, summary.validation_samples) == (9, 36, 3)


def test_a_pair_in_a_supervised_job_and_an_answer_in_a_preference_job_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    single = source(tmp_path / "single.jsonl", {"messages": turns("a", "b")})
    pair = source(tmp_path / "pair.jsonl", text_pair(1))
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer, Limits(99, objective="DPO"), pair, single)
    assert caught.value.problems.lines() == [
        "pvc://data/single.jsonl:1: the line is a sample of format Messages; allowed: pairs (chosen and rejected; or input, "
        "preferred_output, non_preferred_output), as spec.objective.type is DPO"
    ]
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer, Limits(99), pair, single)
    assert caught.value.problems.lines() == [
        "pvc://data/pair.jsonl:1: the line is a pair of two answers (format Preference); "
        "allowed: samples with one answer; or set spec.objective.type to DPO"
    ]


def test_a_pair_that_is_too_long_is_left_out_or_cut_whole(tmp_path: Path, tokenizer: Any) -> None:
    pair = source(tmp_path / "pair.jsonl", text_pair(1), text_pair(2, words=40))
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer, Limits(50, objective="DPO"), pair)
    assert caught.value.problems.lines()[0].startswith("pvc://data/pair.jsonl:2: an answer with its prompt has 7")
    skipped = built(tmp_path, tokenizer, Limits(50, "Skip", objective="DPO"), pair)
    assert (skipped.samples, skipped.documents, skipped.skipped) == (1, 2, 1)
    cut = built(tmp_path, tokenizer, Limits(50, "Truncate", objective="DPO"), pair)
    assert (cut.samples, cut.documents, cut.truncated) == (2, 4, 1)
    assert Documents.open(tmp_path / "out/training").lengths.tolist()[2] == 50


@pytest.mark.parametrize(
    ("most", "remedy"), [(51, "raise it as far"), (50, "the model was made for no more than 50: make ")]
)
def test_answers_that_are_equal_once_cut_are_refused(tmp_path: Path, tokenizer: Any, most: int, remedy: str) -> None:
    pair = source(tmp_path / "pair.jsonl", {"prompt": "a", "chosen": "b " * 60 + "c", "rejected": "b " * 60 + "d"})
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer, Limits(50, "Truncate", objective="DPO", most=most), pair)
    assert remedy in str(caught.value)
    assert "the pair has the same first 50 tokens in both answers; allowed: answers that differ before" in str(caught.value)


def test_columns_of_other_names_are_named_in_errors(tmp_path: Path, tokenizer: Any) -> None:
    names = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    pair = source(tmp_path / "pair.jsonl", {"question": "a", "good": "b", "bad": ""}, fields=names)
    with pytest.raises(DataError) as caught:
        built(tmp_path, tokenizer, Limits(50, objective="DPO"), pair)
    assert caught.value.problems.lines() == ["pvc://data/pair.jsonl:1: bad is empty; allowed: a text"]
