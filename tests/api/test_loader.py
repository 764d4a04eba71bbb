"""The YAML loader reads what kubectl reads, and refuses what is ambiguous, with the line."""

from __future__ import annotations

import pytest

from tuneward_api.loader import YamlError, load_documents, show_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 0.0001}),
        ("a: 1E3", {"a": 1000.0}),
        ("a: 1.048576e+06", {"a": 1048576.0}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: on", {"a": "on"}),
        ("a: yes", {"a": "yes"}),
        ("a: true", {"a": True}),
        ("a: 0", {"a": 0}),
        ("a: -3", {"a": -3}),
        ("a: .5", {"a": 0.5}),
        ("a: 12:30", {"a": "12:30"}),
        ("a: 2024-06-01", {"a": "2024-06-01"}),
        ("a: ~", {"a": None}),
        ("a:", {"a": None}),
        ("a: '010'", {"a": "010"}),
        ('{"a": [1, {"b": "c"}]}', {"a": [1, {"b": "c"}]}),
        ("x: &x {a: 1}\ny: {<<: *x, b: 2}", {"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
    ],
)
def test_values(text: str, value: object) -> None:
    assert [document.value for document in load_documents(text)] == [value]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: duplicate key 'a' in the document"),
        ("s:\n  m:\n    u: 1\n    u: 2", "f.yaml:4: duplicate key 'u' in s.m"),
        ("a: 010", "f.yaml:1: 010 is ambiguous"),
        ("a: .inf", "f.yaml:1: .inf is no number that JSON can hold"),
        ("a: 1e999", "f.yaml:1: 1e999 is no number that JSON can hold"),
        ("1: a", "f.yaml:1: key '1' must be a string; quote it"),
        ("a: [1,\nb: 2", "f.yaml:2:"),
        ("a: !!python/object:os.system x", "f.yaml:1:"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_documents(text, file="f.yaml")
    assert str(caught.value).startswith(message)


def test_documents_and_lines() -> None:
    text = "# head\n---\nkind: A\nspec:\n  list:\n  - x: 1\n  - x: 2\n---\n---\nkind: B\n"
    first, second = load_documents(text)
    assert (first.value["kind"], second.value["kind"], second.line) == ("A", "B", 10)
    assert first.line_of(("spec", "list", 1, "x")) == 7
    assert first.line_of(("spec", "list", 1, "absent")) == 7
    assert first.line_of(("nowhere",)) == 3


def test_paths_read_as_the_api_server_writes_them() -> None:
    assert show_path(("spec", "datasets", "training", 0, "uri")) == "spec.datasets.training[0].uri"
