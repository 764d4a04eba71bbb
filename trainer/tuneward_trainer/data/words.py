"""The ids of whole texts, word by word: most words of a text were met before.

A tokenizer of the kind that marks.py reads cuts a text at its added tokens, what stands between them by regular expressions
into words, and encodes each word alone, whatever stands around it. So a word is asked of it once and remembered, and the
cutting is done here: most of what `tokenizers` takes goes into objects for words that it knows, and Python's `re` takes a
fraction of that. A tokenizer with ▁ for a space cuts nothing, but where none of its tokens has a ▁ behind something else,
none reaches into the next word either.

That both cut alike is proved and not believed. Two engines of one regular expression may count a character to different
classes (Unicode grows every year), or make something else of a row of classes. Rows are tried before the first large batch,
and each character beyond ASCII when it is first met, between neighbours of every kind. A text with one on which they
disagree goes to the tokenizer whole, as do texts of which too many words are new.
"""

from __future__ import annotations

import logging
import random
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Final, Self

import numpy as np
import regex
from numpy.typing import NDArray

from tuneward_trainer.data.documents import ids_of, packed
from tuneward_trainer.data.marks import SPACE, composes, described, spaces_alone

log = logging.getLogger(__name__)

WORTH: Final = 1 << 17
"""Characters of a batch from which on it is worth the proof, which takes a tenth of a second."""
_BYTE_LEVEL: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by, GPT-2's (tokenizers, pre_tokenizers/byte_level.rs)."""
_SPACED: Final = " *[^ ]+| +"
"""Words where a space is a character like others."""
_ATOM: Final = re.compile(r"\\[pP]\{\w+\}|\\.|\[|\]", re.DOTALL)
_FOREIGN: Final = re.compile(r"[^\x00-\x7f]+")
_HELD: Final = 32 << 20
"""Bytes of words and their ids that a process remembers, about."""
_A_WORD: Final = 200
"""Bytes that Python's objects for one take beside its characters."""
_MANY_NEW: Final = 8
"""One new word in so many, and asking for each takes longer than the tokenizer takes for whole texts."""
_REST: Final = 15
"""Batches that go to it whole then, before words are tried again."""
_NEIGHBOURS: Final = "aZ1!' \na"
_ROWS: Final = (
    *("'s", "'RE", "'ll", "'", "a", "Word", "XL", "1", "234", "_", "!", "...", "$", "-", "/", " ", " ", "  ", "\n", "\n\n"),
    *("\r\n", "\t", "\x0b", "\x1c", "\x00", "é", "ß", "ǅ", "日本", "ひ", "й", "ि", "²", "Ⅷ", "٣", "€", "«", "😀", "\u200d"),
    *("\ufe0f", "\x85", "\xa0", "\u2028", "\u3000"),
)
"""Of each kind of character and of contractions some, to be thrown together."""
_TRIED: Final = 256


class Words:
    """`added`: the tokenizer's added tokens and their ids, those that are looked for first in front; `expressions`: by which
    it parts what stands between them, one after the other, or has no token that reaches across, if `spaced`."""

    def __init__(
        self, backend: Any, added: Sequence[Mapping[str, int]], expressions: Sequence[str], *, spaced: bool
    ) -> None:
        self._backend, self._spaced, self._composes = backend, spaced, composes(backend)
        self._added = {token: packed([number]) for tokens in added for token, number in tokens.items()}
        # The first alternative that fits is taken, so the longest stands first: as tokenizers chooses.
        longest = [sorted(tokens, key=len, reverse=True) for tokens in added if tokens]
        self._parters = [re.compile(f"({'|'.join(map(re.escape, tokens))})") for tokens in longest]
        self._cutters = [regex.compile(f"({expression})") for expression in expressions]
        self._ascii_cutters = [re.compile(f"({_of_ascii(expression)})", re.ASCII) for expression in expressions]
        self._agreed: set[str] = set()
        self._odd: set[str] = set()
        self._known = dict(self._added)
        self._held = self._resting = 0
        self._proved: bool | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """Of a tokenizer that marks.py reads, None where its words cannot be told or encoded so."""
        backend = tokenizer.backend_tokenizer
        spaced = spaces_alone(backend)
        expressions = [_SPACED] if spaced else _expressions(described(backend.pre_tokenizer))
        if not expressions or backend.encode_special_tokens or backend.model.dropout:
            return None
        tokens = tokenizer.added_tokens_decoder.items()
        kinds = [{t.content: int(number) for number, t in tokens if t.normalized == late} for late in (False, True)]
        if not all(unicodedata.is_normalized("NFC", token) for kind in kinds for token in kind):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # of sets in sets, which not every engine knows
                return cls(backend, kinds, expressions, spaced=spaced)
        except (re.error, regex.error, FutureWarning):
            return None

    def ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """int32 [tokens] of each, as the tokenizer itself gives them without special tokens around."""
        if self._proved is None and sum(map(len, texts)) >= WORTH:
            self._proved = self._prove()
        if not self._proved or self._resting:
            self._resting -= bool(self._resting)
            return [ids_of(one) for one in self._whole(texts)]
        return self._by_words(texts)

    def _by_words(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        rows = [self._words(text) for text in texts]
        new = self._new(chain.from_iterable(row for row in rows if row is not None))
        if len(new) * _MANY_NEW > sum(len(row) for row in rows if row is not None):
            self._resting = _REST
        self._learn(new)
        known = self._known.__getitem__
        whole = iter(self._whole([text for text, row in zip(texts, rows, strict=True) if row is None]))
        found = [ids_of(next(whole) if row is None else b"".join(map(known, row))) for row in rows]
        if self._held > _HELD:
            self._known, self._held = dict(self._added), 0
        return found

    def _new(self, words: Iterable[str]) -> list[str]:
        return list(set(words) - self._known.keys())

    def _learn(self, words: list[str]) -> None:
        self._known.update(zip(words, self._whole(words), strict=True))
        self._held += sum(map(len, words)) + _A_WORD * len(words)

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [packed(one.ids) for one in found]

    def _words(self, text: str) -> list[str] | None:
        """None where they cannot be told."""
        cutters: list[Any] = self._ascii_cutters
        if not text.isascii():
            if not self._agree(text) or (self._composes and not unicodedata.is_normalized("NFC", text)):
                return None
            cutters = self._cutters
        words: list[str] = []
        for part in self._parted(text):
            if part in self._known:
                words.append(part)
            else:
                words += _cut(part, cutters)
        return words

    def _parted(self, text: str) -> list[str]:
        """At added tokens, which are parts of their own."""
        parts = [text]
        for parter in self._parters:
            split = ([part] if part in self._added else parter.split(part) for part in parts)
            parts = list(filter(None, chain.from_iterable(split)))
        return parts

    def _agree(self, text: str) -> bool:
        """Whether both cut alike at each character of a text."""
        if self._spaced:
            return SPACE not in text
        met = set("".join(_FOREIGN.findall(text)))
        for char in met - self._agreed - self._odd:
            (self._agreed if self._is_cut_alike(char.join(_NEIGHBOURS) + 2 * char) else self._odd).add(char)
        return self._odd.isdisjoint(met)

    def _is_cut_alike(self, text: str) -> bool:
        spans = [span for _, span in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        ends = list(accumulate(map(len, _cut(text, self._cutters))))
        return spans == list(zip([0, *ends], ends, strict=False))

    def _prove(self) -> bool:
        if self._spaced and any(SPACE in token.lstrip(SPACE) for token in self._backend.get_vocab(with_added_tokens=False)):
            return False
        dice = random.Random(0)
        kinds = [*_ROWS, *list(self._added)[:8]]
        plain = [kind for kind in kinds if kind.isascii()]
        texts = ["".join(dice.choices(pool, k=40)) for pool in (kinds, plain) for _ in range(_TRIED)]
        proved = [ids.tobytes() for ids in self._by_words(texts)] == self._whole(texts)
        self._resting = 0  # of what people write more is known
        if not proved:
            log.info("this tokenizer's words are not told by its regular expressions; it encodes whole texts")
        return proved


def _cut(text: str, cutters: Sequence[Any]) -> list[str]:
    """What each matches, and what lies between."""
    parts = [text]
    for cutter in cutters:
        parts = list(filter(None, chain.from_iterable(map(cutter.split, parts))))
    return parts


def _expressions(before: Mapping[str, Any]) -> list[str] | None:
    """By which a pre-tokenizer cuts, in turn; None where it is of a kind that is not known here."""
    found = []
    for step in before.get("pretokenizers", [before]):
        match step:
            case {"type": "ByteLevel", "use_regex": whether}:
                found += [_BYTE_LEVEL] if whether else []
            case {"type": "Digits", "individual_digits": alone}:
                found.append(r"\p{N}" if alone else r"\p{N}+")
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
                found.append(expression)
            case _:
                return None
    return found


def _of_ascii(expression: str) -> str:
    """The same for texts that are ASCII, in what `re` knows: instead of a property its characters."""
    inside = False

    def atom(match: re.Match[str]) -> str:
        nonlocal inside
        found = match[0]
        if found in ("[", "]"):
            inside = found == "["
        if not found.startswith((r"\p", r"\P")):
            return found
        members = filter(regex.compile(found).match, map(chr, range(128)))
        those = "".join(map(re.escape, members)) or r"\x80"  # which no such text has
        return those if inside else f"[{those}]"

    return _ATOM.sub(atom, expression)
