"""The sentences, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from tuneward_api import quantities
from tuneward_api.conditions import Phase
from tuneward_api.files import Progress
from tuneward_cli import words
from tuneward_cli.train import tell_news
from tuneward_cli.voice import Voice
from tuneward_cli.words import Seen


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0, "0s"), (0.2, "1s"), (59, "59s"), (61, "1m01s"), (3599, "59m59s"), (7440, "2h04m"), (277200, "3d05h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert quantities.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "2 kB"), (3_200_000, "3.2 MB"), (269e6, "269 MB"), (5.1e12, "5.1 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 FLOP"), (2.6e12, "2.6 TFLOP"), (4.94e18, "4.94 EFLOP"), (3e23, "300 ZFLOP")]
)
def test_operations(count: float, text: str) -> None:
    assert quantities.operations(count) == text


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (Seen(0, 0), "no step yet"),
        (Seen(0, 25), "step 0/25"),
        (Seen(3, 25, 1.2345, 311.6, 71), "step 3/25, loss 1.234, 312 tokens/s, 1m11s to go"),
        (Seen(3, 25, 1.2345, 311.6, 71, 2_040_109_466), "step 3/25, loss 1.234, 312 tokens/s, 1.9 GiB, 1m11s to go"),
        (Seen(3, 25, 1.2345, 14_500, mfu=0.4213), "step 3/25, loss 1.234, 14,500 tokens/s, 42% MFU"),
        (Seen(25, 25, 0.05, 300.0, 0), "step 25/25, loss 0.050, 300 tokens/s"),
        (Seen(3, 25, 0.6, reward_accuracy=0.875), "step 3/25, loss 0.600, 88% of the pairs right"),
    ],
)
def test_progress_leaves_out_what_is_not_known(seen: Seen, text: str) -> None:
    assert words.progress_line(seen) == text


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({}, "lantern: Pending (waits for the operator)"),
        (
            {"phase": "Validating", "message": "prepare runs"},
            "lantern: Validating (checks model and data, tokenizes): prepare runs",
        ),
        (
            {"phase": "Running", "message": "step 1", "progress": {"step": 1, "steps": 9, "trainLoss": 2.0}},
            "lantern: Running (trains): step 1/9, loss 2.000",
        ),
        ({"phase": "Failed", "message": "DataInvalid: line 3"}, "lantern: Failed (failed): DataInvalid: line 3"),
    ],
)
def test_a_job_in_one_line(status: dict[str, Any], line: str) -> None:
    assert words.job_line({"metadata": {"name": "lantern"}, "status": status}) == line


SAVES = "a checkpoint is being saved (Ctrl-C again gives up on it)"
NOTHING = "this attempt has made no step, so there is nothing to save (Ctrl-C again ends it at once)"


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (None, "its processes save what they have, and end (Ctrl-C again ends them at once)"),
        ({"phase": "Starting"}, NOTHING),
        ({"phase": "Loading", "steps": 9}, NOTHING),
        ({"phase": "Evaluating", "steps": 9}, NOTHING),
        # The step that it is in is ended, and saved.
        ({"phase": "Training", "steps": 9}, SAVES),
        ({"phase": "Evaluating", "step": 3, "steps": 9}, SAVES),
        ({"phase": "Saving", "step": 9, "steps": 9}, SAVES),
    ],
)
def test_what_ctrl_c_saves(progress: dict[str, Any] | None, line: str) -> None:
    assert words.stopping_line(None if progress is None else Progress.model_validate(progress)) == f"stopping: {line}"


def test_every_phase_has_its_words() -> None:
    for phase in Phase:
        assert "does not know" not in words.phase_line("x", phase)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (3.35, 0.0, "perplexity 28.5 before, 1.0 after"),
        (8.108, 2.743, "perplexity 3,321 before, 15.5 after"),
        (1e4, 20.0, "perplexity 1.0e+304 before, 4.9e+08 after"),
    ],
)
def test_perplexity(before: float, after: float, line: str) -> None:
    assert words.perplexity_line(before, after) == line


def test_trackers_are_told_once_and_again_when_they_say_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    said: set[str] = set()
    for state in (
        {"name": "wandb", "url": ""},
        {"name": "wandb", "url": "https://x"},
        {"name": "wandb", "url": "https://x", "message": "no key"},
    ):
        for _ in range(2):
            tell_news(Seen.of({"step": 1, "trackers": [state]}).trackers, said, Voice())
    assert capsys.readouterr().out.splitlines() == ["  wandb: https://x", "  wandb: no key"]


def test_a_state_that_patience_chose_is_named() -> None:
    assert words.chosen_line(16, 30) == "step 16 of 30 became the model: it had the lowest validation loss"
    assert words.chosen_line(30, 30) is None


def test_losses() -> None:
    assert words.losses_line(3.41, 0.62, 0.05) == "validation loss 3.410 before, 0.620 after; training loss 0.050"
    assert words.losses_line(None, None, None) == "no loss was measured"
