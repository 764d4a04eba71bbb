"""The cache on disk: what a set of files becomes, and what is said about all of them when they are bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tuneward_trainer.data.build import DataError, build
from tuneward_trainer.data.documents import Documents
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.gathered import SourceCounts, Summary
from tuneward_trainer.data.samples import Limits, Source


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, "Assistant")


def write(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(value if isinstance(value, str) else json.dumps(value) + "\n" for value in values))
    return path


def source(path: Path, **fields: Any) -> Source:
    return Source(f"pvc://data/{path.name}", path, **fields)


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def test_documents_know_where_they_came_from_and_copies_share_ids(tmp_path: Path, encoder: Encoder, tokenizer: Any) -> None:
    folder = tmp_path / "many"
    write(folder / "a.jsonl", *texts("one two", "three"))
    write(folder / "b.jsonl", "\n", *texts("four five six"))
    sources = [source(folder, copies=2), source(write(tmp_path / "c.jsonl", *texts("seven eight", "three")))]
    summary = build(tmp_path / "out", training=sources, validation=[], encoder=encoder, limits=Limits(16))
    documents = Documents.open(tmp_path / "out/training")
    texts_of = [(document.file, document.line, tokenizer.decode(document.ids.tolist())) for document in documents]
    assert texts_of == [
        ("pvc://data/many/a.jsonl", 1, "one two<|im_end|>"),
        ("pvc://data/many/a.jsonl", 1, "one two<|im_end|>"),
        ("pvc://data/many/a.jsonl", 2, "three<|im_end|>"),
        ("pvc://data/many/a.jsonl", 2, "three<|im_end|>"),
        ("pvc://data/many/b.jsonl", 2, "four five six<|im_end|>"),
        ("pvc://data/many/b.jsonl", 2, "four five six<|im_end|>"),
        ("pvc://data/c.jsonl", 1, "seven eight<|im_end|>"),
        ("pvc://data/c.jsonl", 2, "three<|im_end|>"),
    ]
    assert documents.span(0) == documents.span(1) != documents.span(2)
    assert (documents.originals()[0].tolist(), documents.samples().tolist()) == ([0, 2, 4, 6, 7], [0, 2, 4, 6, 7])
    assert documents[0].weights.tolist() == [0, 1, 1]
    assert (
        summary
        == Summary.read(tmp_path / "out")
        == Summary(
            samples=5,
            documents=8,
            tokens=23,
            target_tokens=15,
            longest=4,
            duplicates=1,
            sources=[
                SourceCounts("pvc://data/many", "training", 2, "Text", samples=3, documents=6, tokens=18, target_tokens=12),
                SourceCounts("pvc://data/c.jsonl", "training", 1, "Text", samples=2, documents=2, tokens=5, target_tokens=3),
            ],
        )
    )


def test_all_errors_of_all_files_are_collected(tmp_path: Path, encoder: Encoder) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    one = write(tmp_path / "a.jsonl", good, "{\n", {"messages": [{"role": "user", "content": "a"}]}, {"text": "x"})
    two = write(tmp_path / "b.jsonl", {"text": ""}, {"text": "long " * 40})
    empty = write(tmp_path / "c.jsonl")
    with pytest.raises(DataError) as caught:
        build(
            tmp_path / "out",
            training=[source(one), source(two)],
            validation=[source(empty)],
            encoder=encoder,
            limits=Limits(40),
        )
    assert caught.value.problems.lines() == [
        "pvc://data/a.jsonl:2: the line is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
        "; allowed: UTF-8 text with one JSON object a line",
        "pvc://data/a.jsonl:3: messages has no assistant turn, so nothing to learn; allowed: at least one assistant turn",
        "pvc://data/a.jsonl:4: messages is missing; allowed: every sample of a source has the format of its first (Messages)",
        "pvc://data/b.jsonl:1: text is empty; allowed: a text",
        "pvc://data/b.jsonl:2: the sample has 42 tokens; allowed: at most 40 (spec.hyperparameters.sequenceLength; raise it as "
        "far as the model allows, or set spec.datasets.onTooLong to Split, Truncate or Skip)",
        "pvc://data/c.jsonl: the source holds no sample; allowed: at least one sample",
    ]


LATE = {"messages": [{"role": "user", "content": "long " * 40}, {"role": "assistant", "content": "b"}]}


def test_too_long_samples_are_split_cut_or_left_out(tmp_path: Path, encoder: Encoder) -> None:
    sources = [source(write(tmp_path / "a.jsonl", *texts("long " * 40, "short")))]
    found = {}
    for rule in ("Split", "Truncate", "Skip"):
        summary = build(
            tmp_path / rule, training=sources, validation=[], encoder=encoder, limits=Limits(20, on_too_long=rule)
        )
        lengths = Documents.open(tmp_path / rule / "training").lengths.tolist()
        found[rule] = (lengths, summary.split, summary.truncated, summary.skipped)
    assert found == {"Split": ([20, 20, 4, 2], 1, 0, 0), "Truncate": ([20, 2], 0, 1, 0), "Skip": ([2], 0, 0, 1)}


def test_the_pieces_of_a_split_text_learn_each_token_but_the_first_once(
    tmp_path: Path, encoder: Encoder, tokenizer: Any
) -> None:
    text = " ".join(str(number) for number in range(99))
    sources = [source(write(tmp_path / "a.jsonl", *texts(text)))]
    build(tmp_path / "out", training=sources, validation=[], encoder=encoder, limits=Limits(16, "Split"))
    pieces = list(Documents.open(tmp_path / "out/training"))
    learnt = [number for piece in pieces for number in piece.ids[piece.weights > 0].tolist()]
    assert tokenizer.decode([int(pieces[0].ids[0]), *learnt]) == text + tokenizer.eos_token
    assert {(piece.line, piece.weights[0], len(piece.ids) <= 16) for piece in pieces} == {(1, 0.0, True)}


@pytest.mark.parametrize(
    ("rule", "most", "said"),
    [
        ("Split", None, "has 73 tokens; allowed: at most 20 (spec.hyperparameters.sequenceLength; raise it as far as the model allows, "
                  "or set spec.datasets.onTooLong to Truncate or Skip)"),
        ("Truncate", 72,
         "has nothing to learn in its first 20 tokens: the first one that is learnt is number 72; allowed: at least 72 tokens a "
         "sample (spec.hyperparameters.sequenceLength; raise it as far as the model allows, or set spec.datasets.onTooLong to "
         "Skip)"),
        # What no sequenceLength cures.
        ("Error", 20, "has 73 tokens; allowed: at most 20 (the model was made for no more than 20: make the sample shorter, set "
                      "spec.datasets.onTooLong to Truncate or Skip, or take a model that was made for longer ones)"),
        ("Truncate", 71, "has nothing to learn in its first 20 tokens: the first one that is learnt is number 72; allowed: at "
                         "least 72 tokens a sample (the model was made for no more than 71: make the sample shorter, set "
                         "spec.datasets.onTooLong to Skip, or take a model that was made for longer ones)"),
    ],
)  # fmt: skip
def test_a_conversation_of_which_nothing_would_be_left_is_refused(
    tmp_path: Path, encoder: Encoder, rule: Any, most: int | None, said: str
) -> None:
    late = source(write(tmp_path / "b.jsonl", LATE))
    with pytest.raises(DataError) as caught:
        build(tmp_path / "out", training=[late], validation=[], encoder=encoder, limits=Limits(20, rule, most=most))
    assert caught.value.problems.lines() == [f"pvc://data/b.jsonl:1: the sample {said}"]


def test_pretraining_learns_texts_alone(tmp_path: Path, encoder: Encoder) -> None:
    late = source(write(tmp_path / "b.jsonl", LATE))
    with pytest.raises(DataError) as caught:
        build(
            tmp_path / "out",
            training=[late],
            validation=[],
            encoder=encoder,
            limits=Limits(99, "Split", objective="Pretraining"),
        )
    assert caught.value.problems.lines() == [
        "pvc://data/b.jsonl:1: the line is a sample of format Messages; "
        "allowed: samples with text, as spec.objective.type is Pretraining"
    ]


def test_held_out_samples_are_chosen_by_content(tmp_path: Path, encoder: Encoder) -> None:
    values = texts(*[f"sample number {index}" for index in range(20)])
    found = []
    for name, order in [("a", values), ("b", [*values[::-1], values[0]])]:
        build(
            tmp_path / name,
            training=[source(write(tmp_path / f"{name}.jsonl", *order), copies=3)],
            validation=[],
            encoder=encoder,
            limits=Limits(16, fraction=0.2),
        )
        parts = [Documents.open(tmp_path / name / part) for part in ("training", "validation")]
        found.append([{tuple(document.ids.tolist()) for document in part} for part in parts])
        assert (len(parts[0]) in (48, 51), len(parts[1]) in (4, 5)) == (True, True)
    assert found[0] == found[1]
    assert not found[0][0] & found[0][1]


def test_duplicates_and_leaks_are_counted(tmp_path: Path, encoder: Encoder) -> None:
    training = source(write(tmp_path / "a.jsonl", *texts("a b", "a b", "c d"), {"text": "e f", "id": 1}))
    validation = source(write(tmp_path / "b.jsonl", *texts("c d", "g h")))
    summary = build(tmp_path / "out", training=[training], validation=[validation], encoder=encoder, limits=Limits(16))
    assert summary.notes() == [
        "1 samples occur more than once",
        "1 validation samples are training samples too: the validation loss flatters",
        "1 samples have the field id, which is ignored",
    ]
    assert summary.validation_samples == 2
