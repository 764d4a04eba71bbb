"""Whether an answer counts, beside the held-out one. Pure: no model, no files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tuneward_api.evaluation import Grader

_FENCE = re.compile(r"^```[a-zA-Z]*\n(.*?)\n?```$", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "input")
"""Names that chat templates give the arguments of a call."""


def accepts(grader: Grader, answer: str, expected: str, schema: dict[str, Any] | None = None) -> bool:
    """Space at the ends never counts. `schema` is for JSONSchema, which looks at no expected answer."""
    if grader == "Exact":
        return answer.strip() == expected.strip()
    if grader == "Contains":
        return _plain(expected) in _plain(answer)
    if grader == "JSONSchema":
        return fits_schema(answer, schema or {})
    wanted = tool_calls(expected)
    if not wanted:
        return not tool_calls(answer) and _plain(answer) == _plain(expected)
    return tool_calls(answer) == wanted


def _plain(text: str) -> str:
    """One space between words, whatever the case."""
    return " ".join(text.split()).casefold()


def fits_schema(answer: str, schema: dict[str, Any]) -> bool:
    """Whether the whole answer, out of a Markdown fence if it is in one, is JSON of `schema`."""
    from jsonschema import Draft202012Validator

    text = answer.strip()
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return bool(Draft202012Validator(schema).is_valid(value))


def schema_of(text: str) -> dict[str, Any]:
    """Reads evaluation.task.jsonSchema. Raises ValueError with what is wrong with it."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{error.json_path}: {error.message}") from error
    found: dict[str, Any] = schema
    return found


def tool_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON with sorted keys) of each call in a rendered answer: every JSON object in it that has a name
    and arguments, which is how most templates write calls; sorted, since calls of one turn have no order."""
    return sorted(call for value in _objects(text) for call in _calls(value))


def _calls(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for one in value:
            yield from _calls(one)
    elif isinstance(value, dict):
        value = value.get("function", value) if isinstance(value.get("function"), dict) else value
        key = next((name for name in _ARGUMENTS if name in value), None)
        if key is not None and isinstance(value.get("name"), str):
            yield value["name"], _canonical(value[key])


def _canonical(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return str(arguments)
    return json.dumps(arguments, sort_keys=True)


def _objects(text: str) -> Iterator[Any]:
    """Every JSON object or list in a text, the outermost ones."""
    decoder, at = json.JSONDecoder(), 0
    while match := re.compile(r"[\[{]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
        except ValueError:
            at = match.start() + 1
        else:
            yield value
