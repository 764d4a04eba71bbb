"""Calls of tools: their arguments as engines give them to a template, and whether all of a call stands in the text.

OpenAI's format has arguments as JSON text; engines parse it before they render, so do we, and refuse a text that would
not come out as it went in. What a template drops of a call would be learnt as a call without it.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Final, TypeAlias

from tuneward_trainer.data.problems import SampleError, show

Calls: TypeAlias = Sequence[dict[str, Any]]
_ALLOWED: Final = "an object, or its JSON text"
_MARK: Final = "73019"
"""Digits that no data is likely to hold: with a number behind them they stand for a value."""
_DOUBLE_DIGITS: Final = 17
"""Digits that always name one double; what has more is another number once it is read."""


def arguments_of(value: Any, path: str) -> dict[str, Any]:
    """As an object. Raises SampleError for what is no JSON object, or loses a key or a number by being read."""
    if isinstance(value, str):
        value = parse(value, path, _ALLOWED) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SampleError(path, f"is {show(value)}", _ALLOWED)
    for place, leaf in leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise SampleError(path + place, f"is {leaf}, which is no JSON", "a number that a double can hold")
    return value


def parse(text: str, path: str, allowed: str) -> Any:
    """JSON text in a field. Raises SampleError for what is none, or would lose a key or a number by being read."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return unique(pairs, path, text)

    def number(literal: str) -> float:
        return _number(literal, path)

    def constant(literal: str) -> float:
        raise SampleError(path, f"holds {literal}, which is no JSON", allowed)

    try:
        return json.loads(text, object_pairs_hook=once, parse_float=number, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise SampleError(path, f"is no JSON ({error})", allowed) from error


def unique(pairs: list[tuple[str, Any]], path: str, text: str) -> dict[str, Any]:
    """A JSON object of `text`, which stands at `path`. Raises SampleError for a key that is there twice: one of both values
    would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        place = (path + _place_of_twice(text)).removeprefix(".")
        raise SampleError(place, f"has the key {show(twice)} twice in one object", "each key once")
    return found


def _place_of_twice(text: str) -> str:
    """Path of the first object that ends with a key twice, as a parser meets it; empty where no parser gets to the end."""

    def place(value: Any, path: str) -> str | None:
        # An object is a tuple of its pairs here.
        pairs = value if isinstance(value, tuple) else ()
        items = [(f"{path}.{key}", item) for key, item in pairs]
        if isinstance(value, list):
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        inner = next(filter(None, (place(item, where) for where, item in items)), None)
        return path if inner is None and len({key for key, _ in pairs}) != len(pairs) else inner

    try:
        return place(json.loads(text, object_pairs_hook=tuple), "") or ""
    except (ValueError, RecursionError):
        return ""


def _number(literal: str, path: str) -> float:
    value = float(literal)
    digits = re.sub(r"[eE].*|[-.]", "", literal).strip("0")
    if math.isfinite(value) and (len(digits) <= _DOUBLE_DIGITS or Decimal(literal) == Decimal(repr(value))):
        return value
    raise SampleError(path, f"holds {literal}, which would be rendered as {value!r}", "numbers that a double can hold")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in `value` that holds nothing else."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, key) of all objects in `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}", key
            yield from keys(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from keys(item, f"{path}[{index}]")


def marked(calls: Calls) -> list[dict[str, Any]]:
    """The calls with a value of its own in each place: one that does not come out is one that the template drops."""
    count = iter(range(10**9))

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark(item) for item in value]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, str):
            return f"q{_MARK}{next(count):04d}q" if value else value
        return int(f"{_MARK}{next(count):04d}")

    return [{**call, "function": {**call["function"], "arguments": mark(call["function"]["arguments"])}} for call in calls]


def dropped(calls: Calls, text: str) -> Iterator[str]:
    """Paths below the list of calls of what is not in the text; a call's arguments where none of them is."""
    for index, call in enumerate(calls):
        function, base = call["function"], f"[{index}].function"
        if not stands(function["name"], text):
            yield f"{base}.name"
        places = [*keys(function["arguments"]), *leaves(function["arguments"])]
        missing = list(dict.fromkeys(place for place, value in places if not stands(value, text)))
        if missing and all(not stands(value, text) for _, value in leaves(function["arguments"]) if value not in (None, "")):
            yield f"{base}.arguments"
        else:
            yield from (f"{base}.arguments{place}" for place in missing)


def stands(value: Any, text: str) -> bool:
    """Whether a value is in the text, as JSON, XML, Python or the plain text has it."""
    if value in (None, "", [], {}):
        return True
    if isinstance(value, bool):
        return str(value) in text or json.dumps(value) in text
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    once = json.dumps(value, ensure_ascii=False)[1:-1]
    forms = (value, value.strip(), once, json.dumps(value)[1:-1], json.dumps(once, ensure_ascii=False)[1:-1])
    return any(form in text for form in (*forms, repr(value)[1:-1], html.escape(value), html.escape(value, quote=False)))
