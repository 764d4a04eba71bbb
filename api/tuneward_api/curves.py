"""The losses of a run directory, as numbers, as a picture for a terminal, and as an SVG that needs nothing beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

Points = list[tuple[int, float]]
"""(step, loss in nats a token), by step."""

COLUMNS: Final = 64
"""Of a terminal, for the curve."""
MARGIN: Final = 10
"""Columns at its left, for losses and the axis."""
_NARROWEST: Final = 25
WIDTH: Final = 720
HEIGHT: Final = 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 40, 46
_TRAINING, _VALIDATION = "#2b5797", "#c2572b"


@dataclass(frozen=True)
class Curves:
    training: Points
    validation: Points

    @property
    def points(self) -> Points:
        return self.training + self.validation


def read(run: Path) -> Curves:
    """From attempts/*/metrics.jsonl. A step that several attempts have made counts as the newest one says."""
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for file in sorted(run.glob("attempts/*/metrics.jsonl"), key=lambda path: _number(path.parent.name)):
        for values in _lines(file):
            step = values.get("step")
            for name, found in (("train_loss", training), ("validation_loss", validation)):
                loss = values.get(name)
                if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
                    found[step] = float(loss)
    return Curves(sorted(training.items()), sorted(validation.items()))


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else -1


def _lines(file: Path) -> list[dict[str, Any]]:
    """A line that a kill has cut is none."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append(values)
    return found


@dataclass(frozen=True)
class Axes:
    """What is shown: steps and losses from, to. Spikes above `top` are drawn at the edge."""

    first: int
    last: int
    bottom: float
    top: float

    @classmethod
    def of(cls, curves: Curves) -> Axes:
        steps, losses = [step for step, _ in curves.points], sorted(loss for _, loss in curves.points)
        bottom, usual = losses[0], losses[(len(losses) - 1) * 98 // 100]
        # An explosion must not press everything else flat.
        top = usual if losses[-1] - bottom > 4 * (usual - bottom) > 0 else losses[-1]
        top = max(top, bottom + 1e-6)
        return cls(min(steps), max(max(steps), min(steps) + 1), bottom, top + 0.05 * (top - bottom))

    def across(self, step: int) -> float:
        """0 … 1."""
        return (step - self.first) / (self.last - self.first)

    def up(self, loss: float) -> float:
        """0 … 1."""
        return min(1.0, (loss - self.bottom) / (self.top - self.bottom))


# -- terminal ----------------------------------------------------------------------------------------------------------


def picture(curves: Curves, *, width: int = COLUMNS, height: int = 10, unicode: bool = True) -> list[str]:
    """Lines of text of at most MARGIN + `width` columns; none for fewer than two training losses, nor where that is too
    narrow. A column shows the mean of its steps."""
    if len(curves.training) < 2 or width < _NARROWEST:
        return []
    axes = Axes.of(curves)
    grid = [[" "] * width for _ in range(height)]
    marks = ("·", "●") if unicode else (".", "o")
    training, validation = (_columns(points, axes, width) for points in (curves.training, curves.validation))
    for mark, columns in zip(marks, (_joined(training), validation), strict=True):
        for column, loss in columns:
            grid[height - 1 - round(axes.up(loss) * (height - 1))][column] = mark
    bar, corner, line = ("│", "└", "─") if unicode else ("|", "+", "-")
    labels = [f"{axes.top - (axes.top - axes.bottom) * row / (height - 1):8.3f}" for row in range(height)]
    drawn = [f"{label if row % 3 == 0 else '':>8} {bar}{''.join(grid[row]).rstrip()}" for row, label in enumerate(labels)]
    scale = f"step {axes.first}".ljust(width - len(str(axes.last))) + str(axes.last)
    legend = f"{marks[0]} training" + (f"   {marks[1]} validation" if curves.validation else "")
    return [*drawn, f"{'':>8} {corner}{line * width}", f"{'':>10}{scale}", f"{'loss':>8}  {legend}"]


def _columns(points: Points, axes: Axes, width: int) -> list[tuple[int, float]]:
    columns: dict[int, list[float]] = {}
    for step, loss in points:
        columns.setdefault(round(axes.across(step) * (width - 1)), []).append(loss)
    return [(column, sum(losses) / len(losses)) for column, losses in columns.items()]


def _joined(columns: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """With what lies between on a straight line, where there are fewer steps than columns."""
    between = [
        (column, left + (right - left) * (column - start) / (stop - start))
        for (start, left), (stop, right) in pairwise(columns)
        for column in range(start, stop)
    ]
    return [*between, columns[-1]]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def svg(curves: Curves, title: str) -> str | None:
    """None where there is nothing to draw."""
    if len(curves.training) < 2:
        return None
    axes = Axes.of(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#333" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14" font-weight="600">{escape(title)}</text>',
        *_legend(curves),
        *_grid(axes),
        *_training(curves.training, axes),
        _line(curves.validation, axes, _VALIDATION, 1.8) if len(curves.validation) > 1 else "",
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_VALIDATION}"/>' for x, y in _places(curves.validation, axes)),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _places(points: Points, axes: Axes) -> list[tuple[float, float]]:
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    return [(_LEFT + wide * axes.across(step), _TOP + high * (1 - axes.up(loss))) for step, loss in points]


def _line(points: Points, axes: Axes, color: str, width: float, opacity: float = 1.0) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in _places(points, axes))
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity:g}"/>'


def _training(points: Points, axes: Axes) -> list[str]:
    """Every step, and where there are many the mean of each one's neighbourhood over them."""
    reach = len(points) // 40
    if not reach:
        return [_line(points, axes, _TRAINING, 1.5)]
    losses = [loss for _, loss in points]
    near = [losses[max(0, index - reach) : index + reach + 1] for index in range(len(losses))]
    means = [(step, sum(part) / len(part)) for (step, _), part in zip(points, near, strict=True)]
    return [_line(points, axes, _TRAINING, 1, opacity=0.35), _line(means, axes, _TRAINING, 2)]


def _legend(curves: Curves) -> list[str]:
    names = [("training", _TRAINING), ("validation", _VALIDATION)][: 2 if curves.validation else 1]
    start = WIDTH - _RIGHT - 96 * len(names)
    return [
        f'<circle cx="{start + 96 * index}" cy="18" r="4" fill="{color}"/>'
        f'<text x="{start + 96 * index + 9}" y="22">{name}</text>'
        for index, (name, color) in enumerate(names)
    ]


def _grid(axes: Axes) -> list[str]:
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    drawn = []
    for loss in ticks(axes.bottom, axes.top):
        ((_, y),) = _places([(axes.first, loss)], axes)
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e3e6ea"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in sorted({round(value) for value in ticks(axes.first, axes.last)}):
        ((x, _),) = _places([(step, axes.bottom)], axes)
        drawn.append(f'<path d="M{x:.1f} {floor}v5" stroke="#888"/>')
        drawn.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{step}</text>')
    drawn.append(f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="#888"/>')
    drawn.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    middle = (_TOP + floor) // 2
    turned = f'text-anchor="middle" transform="rotate(-90 16 {middle})"'
    drawn.append(f'<text x="16" y="{middle}" {turned}>loss, nats</text>')
    return drawn


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in low … high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(run: Path, title: str) -> Path | None:
    """Writes <run>/loss.svg from what all attempts have left; None where that is too little."""
    text = svg(read(run), title)
    if text is None:
        return None
    file = run / "loss.svg"
    file.write_text(text)
    return file
