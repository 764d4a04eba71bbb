"""From tokens to text, as far as it is certain: no half characters, and nothing that a stop string may still take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_HALF = "\ufffd"


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


class TextStream:
    """Give it tokens, it gives the text that is new.

    Only tokens since the last whole character are decoded, with those before as context: decoding everything at
    every token is quadratic, and decoding one token alone loses the spaces of SentencePiece.
    """

    def __init__(self, decoder: Decoder, context: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._ids = list(context[-8:])
        self._context = 0
        self._read = len(self._ids)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is now certain, perhaps none."""
        self._ids.append(token)
        return self._release(self._fresh())

    def flush(self) -> str:
        """What was held back, at the end."""
        before = self._decode(self._context, self._read)
        tail = self._decode(self._context, len(self._ids))[len(before) :]
        return "" if self.stopped else self._release(tail) + self._drop_held()

    def _fresh(self) -> str:
        before = self._decode(self._context, self._read)
        after = self._decode(self._context, len(self._ids))
        if len(after) <= len(before) or after.endswith(_HALF):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._decoder.decode(self._ids[start:end], skip_special_tokens=True)

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _drop_held(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
