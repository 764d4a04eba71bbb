"""Every refusal of the command is a sentence and a command to paste, with an exit code that says what kind it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneward_cli.main import main, parser


@pytest.mark.parametrize(
    ("arguments", "code", "sentence", "paste"),
    [
        (["bogus"], 2, "invalid choice: 'bogus'", "tuneward --help"),
        (["train"], 2, "required: FILE", "tuneward train --help"),
        (["train", "nothing.yaml"], 66, "nothing.yaml cannot be read", "ls examples/"),
        (["train", "x.yaml", "--workers", "0"], 2, "'0' must be a whole number", "tuneward train --help"),
        (["train", "x.yaml", "--profile", "5-3"], 2, "'5-3' must be FROM-TO", "tuneward train --help"),
        (["train", "x.yaml", "--claim", "nodir"], 2, "'nodir' must be NAME=DIR", "tuneward train --help"),
        (["validate", "data.jsonl"], 2, "its chat template comes from a model", "tuneward validate data.jsonl --model DIR"),
        (["validate", "nothing.yaml"], 66, "cannot be read", "ls examples/"),
        (["validate", "nothing.jsonl", "--model", "."], 66, "nothing.jsonl is not there", "ls"),
        (["validate", "nothing.json", "--model", "."], 66, "nothing.json is not there", "ls"),
        (["import", "nothing", "name"], 66, "nothing is no model folder", "ls nothing"),
        (["import", ".", "a/b"], 2, "'a/b' must be letters", "tuneward import DIR my-model"),
        (["chat", "--store", "nothing"], 1, "holds no finished job", "tuneward train examples/finetune.yaml"),
        (["watch", "lantern", "--kubeconfig", "nothing"], 1, "no cluster: nothing cannot be used", "tuneward up"),
        (["up", "--output", "yaml"], 2, "invalid choice: 'yaml'", "tuneward up --help"),
    ],
)
def test_an_error_is_a_sentence_and_a_command(
    arguments: list[str],
    code: int,
    sentence: str,
    paste: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr().err
    first, _, last = said.partition("\n  next: ")
    assert first.startswith("✗ ")
    assert sentence in first
    assert last.startswith(paste)


def test_without_a_cluster_the_next_step_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEWARD_HOME", str(tmp_path / "none"))
    assert main([]) == 0
    assert "next: tuneward demo" in capsys.readouterr().out
    assert main(["status"]) == 3


def test_no_kubeconfig_anywhere_says_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("TUNEWARD_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["watch", "lantern"]) == 1
    assert "next: tuneward up" in capsys.readouterr().err


def test_every_command_has_help() -> None:
    for action in parser()._subparsers._group_actions:  # type: ignore[union-attr]
        for name, command in action.choices.items():  # type: ignore[union-attr]
            assert command.description, name
