"""From samples to token ids and one loss weight a token, in batches.

Masks come from character offsets of one encoding of the whole text, never from the value of an id: a model's pad token
may be its stop token. Where a token reaches across the end of a prompt, no such mask is right, since an engine encodes
the prompt alone; then prompt and answer are encoded apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tuneward_trainer.data.documents import Encoded, ids_of
from tuneward_trainer.data.formats import Sample
from tuneward_trainer.data.marks import Marks, Tails
from tuneward_trainer.data.plans import Places
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.render import LossOn, Rendered, Renderer
from tuneward_trainer.data.templates import Held, chat_template, quick_template
from tuneward_trainer.data.words import Words

Offsets: TypeAlias = list[tuple[int, int]]


class SampleEncoder(Protocol):
    """What turns samples into documents, whatever the tokenizer."""

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        """One entry for each sample: its documents, or what is wrong with it."""


def document(ids: NDArray[np.int32], learnt: NDArray[np.bool_]) -> Encoded:
    """Of tokens (int32, bool [tokens]). Nothing predicts the first, and nothing after the last learnt one is kept. Raises
    SampleError."""
    kept = learnt.tobytes().rfind(1) + 1
    if kept < 2:
        raise SampleError("", "has no token to learn", "samples with something to learn after their first token")
    weights = learnt[:kept].astype("<f2")
    weights[0] = 0
    return Encoded(ids[:kept], weights)


@dataclass
class _Tokens:
    """One text's tokens. `cuts`: index of the first token of each part but the first, by its place in the text."""

    ids: list[int]
    offsets: Offsets
    cuts: dict[int, int]


@dataclass(frozen=True)
class _Marked:
    """One text's tokens, int32 [tokens], and where its spans stand among them."""

    ids: NDArray[np.int32]
    places: Places


_Found: TypeAlias = _Tokens | _Marked


class _NeedsApartError(Exception):
    """A token reaches across the end of a prompt, or nothing ends a turn in the middle."""


class Encoder:
    """A tokenizer and its chat template. `stops` are ids at which generation ends, beside the tokenizer's own eos."""

    def __init__(self, tokenizer: Any, loss_on: LossOn, stops: Sequence[int] = ()) -> None:
        held = Held(tokenizer)
        source = str(tokenizer.chat_template or "")
        self._renderer = Renderer(chat_template(held), loss_on, quick_template(held), source)
        self._eos: int | None = tokenizer.eos_token_id
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stops = set(stops) | ({self._eos} - {None})
        self._is_stop = np.zeros(max(self._stops, default=0) + 2, np.bool_)  # the last entry stands for all ids behind it
        self._is_stop[list(self._stops)] = True
        first = tokenizer("").input_ids[:1]
        self._lead: list[int] = [first[0]] if first and first[0] == tokenizer.bos_token_id else []
        # The call above has told it to cut nothing and to pad nothing.
        self._backend = tokenizer.backend_tokenizer
        self._tails = Tails(self._alone)
        # Tokenizers of the SentencePiece kind put a space before whatever they encode: parts cannot be joined.
        self._joins = tokenizer.decode([*self._alone("x"), *self._alone("y")]) == "xy"
        self._marks = Marks.of(tokenizer, self._stops, self._tails) if self._joins else None
        self._words = Words.of(tokenizer) if self._marks is not None else None

    def __getstate__(self) -> tuple[dict[str, Any], bool]:
        """What is proved before it goes to other processes need not be proved in each."""
        self._renderer.foresee()
        return self.__dict__, self._backend.encode_special_tokens

    def __setstate__(self, state: tuple[dict[str, Any], bool]) -> None:
        self.__dict__, self._backend.encode_special_tokens = state[0], state[1]

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | SampleError]:
        """One entry for each sample: its documents, or what is wrong with it."""
        rendered = [self._render(sample) for sample in samples]
        flat = [text for texts in rendered if not isinstance(texts, SampleError) for text in texts]
        found = iter(self._found(flat))
        return [
            texts if isinstance(texts, SampleError) else self._finish(sample, texts, [next(found) for _ in texts])
            for sample, texts in zip(samples, rendered, strict=True)
        ]

    def _render(self, sample: Sample) -> list[Rendered] | SampleError:
        try:
            return self._renderer.render(sample)
        except SampleError as error:
            return error

    def _finish(self, sample: Sample, texts: list[Rendered], found: list[_Found]) -> list[Encoded] | SampleError:
        try:
            try:
                return [self._weigh(text, one) for text, one in zip(texts, found, strict=True)]
            except _NeedsApartError:
                apart = self._renderer.render_apart(sample)
                return [self._weigh(text, one) for text, one in zip(apart, self._encode_all(apart), strict=True)]
        except SampleError as error:
            return error

    def _found(self, texts: list[Rendered]) -> list[_Found]:
        """The tokens of each text, and with them its places where no offsets are needed for them."""
        whole = [self._marks is not None and not text.parts for text in texts]
        ids = iter(self._ids([text.text for text, is_whole in zip(texts, whole, strict=True) if is_whole]))
        first = [self._marked(text, next(ids)) if is_whole else None for text, is_whole in zip(texts, whole, strict=True)]
        rest = iter(self._encode_all([text for text, found in zip(texts, first, strict=True) if found is None]))
        return [found or next(rest) for found in first]

    def _marked(self, text: Rendered, ids: NDArray[np.int32]) -> _Marked | None:
        """None where offsets are needed."""
        places = self._marks.places(text, ids) if self._marks is not None else None
        if places is None:
            return None
        if not text.raw or ids[: len(self._lead)].tolist() == self._lead:
            return _Marked(ids, places)
        return _Marked(np.concatenate([ids_of(self._lead), ids]), places.behind(len(self._lead)))

    def _ids(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """The same ids as `_plain` gives, without offsets."""
        if self._words is not None:
            return self._words.ids(texts)
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [ids_of(one.ids) for one in found]

    def _encode_all(self, texts: list[Rendered]) -> list[_Tokens]:
        """All texts, part by part, in one call of the tokenizer, which spreads it over the cores."""
        cuts = [[0, *(text.parts if self._joins else ()), len(text.text)] for text in texts]
        parts = self._plain([text.text[a:b] for text, at in zip(texts, cuts, strict=True) for a, b in pairwise(at)])
        remaining = iter(parts)
        return [
            _join([(start, next(remaining)) for start in at[:-1]], self._lead if text.raw else [])
            for text, at in zip(texts, cuts, strict=True)
        ]

    def _plain(self, texts: list[str]) -> list[_Tokens]:
        found = self._backend.encode_batch(texts, add_special_tokens=False) if texts else []
        return [_Tokens(one.ids, one.offsets, {}) for one in found]

    def _alone(self, text: str) -> list[int]:
        return self._plain([text])[0].ids

    def _weigh(self, text: Rendered, found: _Found) -> Encoded:
        """Weights from spans; a stop token at the end of each turn; nothing after the last learnt token."""
        marked = found if isinstance(found, _Marked) else self._told(text, found)
        ids, learnt = marked.ids, np.zeros(len(marked.ids), np.bool_)
        bounds, ended = marked.places
        for first, last in bounds:
            learnt[first:last] = True
        if not all(ended):
            if not ended[-1] and text.spans[-1][1] == len(text.text) and self._eos is not None:
                ids, learnt, ended = np.append(ids, np.int32(self._eos)), np.append(learnt, [True]), ended[:-1]
            if text.turns and not all(ended):
                raise _NeedsApartError
        if text.turns:
            self._check_stops(ids, learnt, [*(last - 1 for _, last in bounds), len(ids) - 1])
        return document(ids, learnt)

    def _check_stops(self, ids: NDArray[np.int32], learnt: NDArray[np.bool_], lasts: Sequence[int]) -> None:
        """`lasts`: the last tokens of the learnt turns. Raises SampleError where generation would end before."""
        within = learnt.copy()
        within[lasts] = False
        within &= self._is_stop.take(ids, mode="clip")
        if within.any():
            token = self._backend.id_to_token(int(ids[within.argmax()]))
            raise SampleError("", f"has {token} within an answer, at which generation ends", "answers without that text")

    def _told(self, text: Rendered, tokens: _Tokens) -> _Marked:
        """By offsets."""
        places = Places([], [])
        for start, end in text.spans:
            first = self._boundary(text, tokens, start)
            last = bisect_left(tokens.offsets, end, key=lambda offset: offset[0])
            places.add(first, last, self._after_stop(text, tokens, first, last), turns=text.turns)
        return _Marked(ids_of(tokens.ids), places)

    def _boundary(self, text: Rendered, tokens: _Tokens, start: int) -> int:
        """Index of the first token of the part of the text that begins at `start`, if one does begin there."""
        if start == 0:
            return 0
        if start in tokens.cuts:
            return tokens.cuts[start]
        index = bisect_left(tokens.offsets, start + 1, key=lambda span: span[1])
        begins = index < len(tokens.ids) and tokens.offsets[index][0] == tokens.offsets[index - 1][1] == start
        if begins and self._encodes_alone(text, tokens, start, index):
            return index
        # Some tokenizers leave spaces out of their offsets: only the encoding of the prompt tells.
        prompt = (self._lead if text.raw else []) + self._alone(text.text[:start])
        if tokens.ids[: len(prompt)] == prompt:
            return len(prompt)
        if self._joins:
            raise _NeedsApartError
        return index if begins else index + 1

    def _encodes_alone(self, text: Rendered, tokens: _Tokens, start: int, index: int) -> bool:
        """Whether the prompt alone has the same tokens. Special tokens part a text, so only what stands behind the last
        of them is encoded, which is nearly always the same few characters."""
        first = next((i + 1 for i in range(index - 1, -1, -1) if tokens.ids[i] in self._special), 0)
        if not first or not self._joins:
            return False
        tail = text.text[tokens.offsets[first - 1][1] : start]
        return tokens.ids[first:index] == self._tails[tail]

    def _after_stop(self, text: Rendered, tokens: _Tokens, first: int, last: int) -> int | None:
        """Index after the token that ends the turn, None if none does: among the special tokens at the end, with what
        space the template puts between them, the first at which generation ends, else the last."""
        ends, stops = [], []
        for index in range(last - 1, first - 1, -1):
            start, end = tokens.offsets[index]
            if tokens.ids[index] in self._stops:
                stops.append(index + 1)
            elif tokens.ids[index] in self._special:
                ends.append(index + 1)
            elif text.text[start:end].strip():
                break
        return stops[-1] if stops else ends[0] if ends else None


def _join(parts: list[tuple[int, _Tokens]], lead: list[int]) -> _Tokens:
    """Parts at their places in the text, behind `lead` unless the text brings it itself."""
    begin = lead if parts[0][1].ids[: len(lead)] != lead else []
    if len(parts) == 1 and not begin:
        return replace(parts[0][1], cuts={parts[0][0]: 0})
    joined = _Tokens(list(begin), [(0, 0)] * len(begin), {})
    for start, part in parts:
        joined.cuts[start] = len(joined.ids)
        joined.ids += part.ids
        joined.offsets += [(first + start, last + start) for first, last in part.offsets]
    return joined
