"""How a command ends badly: one sentence, one command to paste, one exit code."""

from __future__ import annotations

from typing import Final

USAGE: Final = 2
NOT_RUNNING: Final = 3
INTERRUPTED: Final = 130


class CommandError(Exception):
    """Shown to a person, so `sentence` says what happened and `paste` is a whole command."""

    def __init__(self, sentence: str, *, paste: str = "", code: int = 1) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.paste = paste
        self.code = code

    def __str__(self) -> str:
        return f"{self.sentence.rstrip('.')}; next: {self.paste}" if self.paste else self.sentence


class RefusedError(Exception):
    """The API server said no. `message` is its own sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
