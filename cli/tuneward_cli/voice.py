"""How a command speaks: bars on a terminal, plain lines elsewhere, and silence beside `--output json`.

A wait says at least every 10 seconds what is waited for, so that no log and no person ever wonders.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tuneward_api.conditions import Phase
from tuneward_cli.words import Seen, progress_line

HEARTBEAT: Final = 10.0
_LINE_EVERY: Final = 3.0
"""Seconds between two lines of progress where the output is no terminal."""


class Wait:
    """Something that takes a while. `say` changes the detail; safe to call from any thread."""

    def __init__(self) -> None:
        self.detail = ""
        self.result = ""

    def say(self, detail: str) -> None:
        self.detail = detail

    def end_with(self, text: str) -> None:
        """What the ticked line says instead of the detail."""
        self.result = text


class Voice:
    """`output` is `text` or `json`; with json every line goes to stderr and stdout holds the one JSON."""

    def __init__(self, output: str = "text") -> None:
        self.json = output == "json"
        self.console = Console(stderr=self.json, highlight=False, soft_wrap=True)
        self.terminal = self.console.is_terminal
        self.unicode = self.console.encoding.startswith("utf")

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def done(self, text: str) -> None:
        self.line(f"✓ {text}")

    def result(self, value: dict[str, Any]) -> None:
        """The one JSON; nothing without --output json."""
        if self.json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    @contextmanager
    def waiting(self, label: str) -> Iterator[Wait]:
        """Ticks `label` with its time at the end. An exception leaves no tick: the error line follows."""
        wait, started = Wait(), time.monotonic()
        with self._spinner(label, wait) if self.terminal else self._heartbeat(label, wait):
            yield wait
        detail = f": {wait.result}" if wait.result else ""
        self.done(f"{label}{detail} ({time.monotonic() - started:.0f} s)")

    @contextmanager
    def _spinner(self, label: str, wait: Wait) -> Iterator[None]:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label)
            with _every(0.2, lambda: progress.update(task, description=_labelled(label, wait.detail))):
                yield

    @contextmanager
    def _heartbeat(self, label: str, wait: Wait) -> Iterator[None]:
        started = time.monotonic()
        self.line(f"… {label}")
        with _every(HEARTBEAT, lambda: self.line(f"… {_labelled(label, wait.detail)} ({time.monotonic() - started:.0f} s)")):
            yield

    @contextmanager
    def bar(self, label: str) -> Iterator[Bar]:
        """A live bar over steps. On a terminal a line about its end stays."""
        bar: Bar = LiveBar(self, label) if self.terminal else PlainBar(self, label)
        with bar.shown():
            yield bar


def _labelled(label: str, detail: str) -> str:
    return f"{label}: {detail}" if detail else label


class Bar:
    """Steps of a training run."""

    def __init__(self, voice: Voice, label: str) -> None:
        self.voice, self.label, self.seen = voice, label, Seen(0, 0)

    def update(self, seen: Seen) -> None:
        raise NotImplementedError

    def phase(self, phase: str, line: str) -> None:
        """`phase` may be the one that is shown already; `line` is the whole sentence about it."""
        raise NotImplementedError

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield


class PlainBar(Bar):
    """One line every few seconds while steps go by, and one every ten while they do not. What was said already is said
    again with the time since."""

    def __init__(self, voice: Voice, label: str) -> None:
        super().__init__(voice, label)
        self._spoken_at = self._first_at = float("-inf")
        self._phase = self._line = self._spoken = ""

    def phase(self, phase: str, line: str) -> None:
        self._line = line
        if phase != self._phase:
            self._phase = phase
            self._speak(line)

    def _speak(self, text: str) -> None:
        self._spoken_at = time.monotonic()
        if text != self._spoken:
            self._spoken, self._first_at = text, self._spoken_at
            self.voice.line(f"… {text}")
        else:
            self.voice.line(f"… {text} ({self._spoken_at - self._first_at:.0f} s)")

    def update(self, seen: Seen) -> None:
        text = self._line or f"{self.label}: {progress_line(seen)}"
        last = seen.steps > 0 and seen.step == seen.steps
        quiet = time.monotonic() - self._spoken_at
        news = seen != self.seen and text != self._spoken
        if (news and (quiet >= _LINE_EVERY or last)) or quiet >= HEARTBEAT:
            self._speak(text)
        self.seen = seen


class LiveBar(Bar):
    """Rich's bar with loss, speed and time to go."""

    def __init__(self, voice: Voice, label: str) -> None:
        super().__init__(voice, label)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[line]}", markup=False),
            console=voice.console,
            transient=True,
        )
        self._end = ""
        self._task = self._progress.add_task(label, total=None, line="")

    def update(self, seen: Seen) -> None:
        self.seen = seen
        self._progress.update(self._task, total=seen.steps or None, completed=seen.step, line=progress_line(seen))

    def phase(self, phase: str, line: str) -> None:
        # While it trains the bar itself says how far; in every other phase the sentence says what is waited for.
        shown = f"{self.label}: {phase}" if phase == Phase.RUNNING else line
        self._end = line if phase == Phase.SUCCEEDED else ""
        self._progress.update(self._task, description=shown)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._progress:
            yield
        # The bar is cut at the terminal's edge; what stays on the screen is whole. An error says itself what it is.
        if self.seen.steps:
            self.voice.line(f"{self.label}: {progress_line(self.seen)}")
        if self._end:
            self.voice.done(self._end)


@contextmanager
def _every(seconds: float, action: Any) -> Iterator[None]:
    """Calls `action` in a thread until the block ends."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
