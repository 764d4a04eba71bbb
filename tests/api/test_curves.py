"""Losses of a run directory as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tuneward_api import curves
from tuneward_api.curves import Curves, picture, svg, ticks


def written(run: Path, attempt: int, *lines: dict[str, float | int]) -> None:
    folder = run / f"attempts/{attempt}"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_step_that_was_made_twice_counts_as_the_newest_attempt_says(tmp_path: Path) -> None:
    written(tmp_path, 2, {"step": 2, "train_loss": 1.5}, {"step": 10, "train_loss": 1.0})
    written(tmp_path, 10, {"step": 10, "train_loss": 0.5}, {"step": 10, "validation_loss": 0.7})
    written(tmp_path, 1, {"step": 0, "validation_loss": 3.0}, {"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": 9.0})
    with (tmp_path / "attempts/10/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "train_lo')
    assert curves.read(tmp_path) == Curves([(1, 2.0), (2, 1.5), (10, 0.5)], [(0, 3.0), (10, 0.7)])


FALLING = Curves([(step, 4.0 - step / 10) for step in range(1, 31)], [(0, 4.0), (30, 1.5)])


def test_a_picture_has_axes_and_both_curves() -> None:
    assert picture(FALLING, width=30, height=4) == [
        "   4.150 │●···",
        "         │    ··········",
        "         │              ··········",
        "   1.000 │                        ·····●",
        "         └──────────────────────────────",
        "          step 0                      30",
        "    loss  · training   ● validation",
    ]


@pytest.mark.parametrize(("width", "widest"), [(25, 35), (24, 0), (-10, 0)])
def test_a_picture_is_no_wider_than_asked_and_none_where_that_shows_nothing(width: int, widest: int) -> None:
    assert max(map(len, picture(FALLING, width=width)), default=0) == widest


def test_plain_letters_where_a_terminal_has_no_others() -> None:
    assert "".join(picture(FALLING, unicode=False)).isascii()


@pytest.mark.parametrize("found", [Curves([], []), Curves([(1, 2.0)], []), Curves([], [(0, 1.0)])])
def test_one_point_is_no_curve(found: Curves, tmp_path: Path) -> None:
    assert (picture(found), svg(found, "x"), curves.draw(tmp_path, "x")) == ([], None, None)
    assert not list(tmp_path.iterdir())


def test_the_svg_needs_nothing_beside_it(tmp_path: Path) -> None:
    written(
        tmp_path,
        1,
        *({"step": step, "train_loss": loss} for step, loss in FALLING.training),
        {"step": 30, "validation_loss": 1.5},
    )
    file = curves.draw(tmp_path, "a <b> & c")
    assert file == tmp_path / "loss.svg"
    text = file.read_text()
    assert not [word for word in ("href", "url(", "<script", "<style", "@import") if word in text]
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"a <b> & c", "training", "validation", "optimizer step", "loss, nats", "10", "2"} <= set(texts)
    line = next(element for element in root.iter(f"{space}polyline"))
    places = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert len(places) == 30
    assert all(0 <= x <= curves.WIDTH and 0 <= y <= curves.HEIGHT for x, y in places)
    assert [y for _, y in places] == sorted(y for _, y in places)


def test_an_explosion_is_drawn_at_the_edge() -> None:
    losses = [(step, 1.0 + step % 2 / 10) for step in range(200)]
    axes = curves.Axes.of(Curves([*losses, (200, 500.0)], []))
    assert axes.top < 2
    assert axes.up(500.0) == 1.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.2, 3.9, [2, 3]),
        (0, 25, [0, 5, 10, 15, 20, 25]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected
