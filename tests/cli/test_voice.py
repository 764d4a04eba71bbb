"""Plain lines where there is no terminal, bars where there is one, one JSON where a script asks for it."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from tuneward_cli import voice as module
from tuneward_cli.voice import LiveBar, PlainBar, Voice
from tuneward_cli.words import Seen


def test_a_wait_speaks_while_nothing_happens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    with Voice().waiting("model") as wait:
        wait.say("3 MB of 9 MB")
        time.sleep(0.2)
        wait.end_with("whole")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "… model"
    assert lines[1].startswith("… model: 3 MB of 9 MB (")
    assert lines[-1] == "✓ model: whole (0 s)"


def test_a_wait_that_fails_has_no_tick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), Voice().waiting("model"):
        raise ValueError("no")
    assert "✓" not in capsys.readouterr().out


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    voice = Voice("json")
    voice.done("cluster")
    voice.result({"answer": 42})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"answer": 42}
    assert "✓ cluster" in said.err


def test_text_has_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    Voice().result({"answer": 42})
    assert capsys.readouterr().out == ""


def test_a_plain_bar_says_the_last_step_and_not_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Voice().bar("lantern") as bar:
        assert isinstance(bar, PlainBar)
        for step in range(1, 26):
            bar.update(Seen(step, 25))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["… lantern: step 1/25", "… lantern: step 25/25"]


def test_a_plain_bar_says_each_phase_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Voice().bar("lantern") as bar:
        for _ in range(3):
            bar.phase("Starting", "lantern: Starting")
            bar.update(Seen(0, 0))
    assert capsys.readouterr().out.splitlines() == ["… lantern: Starting"]


def test_a_plain_bar_that_says_the_same_again_says_for_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Voice().bar("lantern") as bar:
        bar.phase("Running", "lantern: step 25/25")
        bar.update(Seen(25, 25))
        assert capsys.readouterr().out.splitlines() == ["… lantern: step 25/25"]
        monkeypatch.setattr(module, "HEARTBEAT", 0)
        bar.update(Seen(25, 25))
    assert capsys.readouterr().out.splitlines() == ["… lantern: step 25/25 (0 s)"]


def test_a_terminal_gets_a_bar() -> None:
    voice = Voice()
    screen = io.StringIO()
    voice.console = Console(file=screen, force_terminal=True, width=100)
    voice.terminal = True
    with voice.bar("lantern") as bar:
        assert isinstance(bar, LiveBar)
        bar.phase("Running", "lantern: Running")
        bar.update(Seen(12, 25, 0.5, 300, 40))
    assert "step 12/25, loss 0.500, 300 tokens/s, 40s to go" in screen.getvalue()


def test_what_stays_of_a_bar_is_whole() -> None:
    voice = Voice()
    screen = io.StringIO()
    voice.console = Console(file=screen, force_terminal=True, width=60, highlight=False, soft_wrap=True)
    voice.terminal = True
    sentence = "lantern: Succeeded (ended in a model): FineTunedModel lantern-385d105f is ready to be served"
    with voice.bar("lantern") as bar:
        bar.update(Seen(25, 25, 0.013, 300, 0))
        bar.phase("Succeeded", sentence)
    assert screen.getvalue().endswith(f"lantern: step 25/25, loss 0.013, 300 tokens/s\n✓ {sentence}\n")
