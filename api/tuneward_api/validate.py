"""Documents -> resources, or every error with file, line, field, what was seen and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuneward_api.base import Model
from tuneward_api.finetunedmodel import FineTunedModel
from tuneward_api.finetunejob import FineTuneJob
from tuneward_api.loader import Document, Path, show_path
from tuneward_api.modelserver import ModelServer
from tuneward_api.names import API_VERSION, GROUP

KINDS: dict[str, type[Model]] = {
    "FineTuneJob": FineTuneJob,
    "FineTunedModel": FineTunedModel,
    "ModelServer": ModelServer,
}


@dataclass(frozen=True)
class Problem:
    """One thing to change."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.field}: {self.message}"
            if self.field
            else f"{self.file}:{self.line}: {self.message}"
        )


def validate_document(document: Document) -> tuple[Model | None, list[Problem]]:
    """The resource, or all problems; (None, []) for a kind that is not ours."""
    value = document.value
    if not isinstance(value, dict):
        return None, [
            Problem(document.file, document.line, "", "must be a Kubernetes object (a map with apiVersion and kind)")
        ]
    api_version, kind = value.get("apiVersion"), value.get("kind")
    if not str(api_version).startswith(f"{GROUP}/"):
        return None, _missing(document, value)
    if api_version != API_VERSION or kind not in KINDS:
        allowed = ", ".join(KINDS)
        message = f"{api_version} {kind} is not known; allowed are {allowed} of {API_VERSION}"
        return None, [Problem(document.file, document.line_of(("kind",)), "kind", message)]
    try:
        return KINDS[kind].model_validate(value), []
    except ValidationError as error:
        return None, problems_of(document, KINDS[kind], error)


def problems_of(document: Document, model: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Where in `document` a value is not one that `model` takes, and what it takes."""
    return [_problem(document, model, detail) for detail in error.errors(include_url=False)]


def _missing(document: Document, value: dict[str, Any]) -> list[Problem]:
    return [
        Problem(document.file, document.line, field, "required; every Kubernetes object has it")
        for field in ("apiVersion", "kind")
        if not value.get(field)
    ]


def _problem(document: Document, model: type[BaseModel], detail: ErrorDetails) -> Problem:
    path = _in_document(document.value, detail["loc"])
    return Problem(document.file, document.line_of(path), show_path(path), _sentence(model, path, detail))


def _in_document(value: Any, loc: Iterable[str | int]) -> Path:
    """pydantic's location without the parts that name a branch of a union."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            continue
        path.append(part)
    return tuple(path)


def _sentence(model: type[BaseModel], path: Path, detail: ErrorDetails) -> str:
    """What was seen and what is allowed, in one sentence."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return "required"
    if kind == "extra_forbidden":
        return f"unknown field; allowed here: {', '.join(_fields(model, path[:-1]))}"
    if kind == "rule":
        return f"{_seen(detail['input'])}{context['reason']}"
    return f"{_seen(detail['input'])}{_allowed(kind, context, detail['msg'])}"


_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a string; quote it",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a map",
    "model_type": "must be a map",
    "model_attributes_type": "must be a map",
}


def _allowed(kind: str, context: dict[str, Any], fallback: str) -> str:
    bounds = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "allowed: {expected}",
        "enum": "allowed: {expected}",
        "string_too_long": "must have at most {max_length} characters",
        "string_too_short": "must have at least {min_length} characters",
        "too_long": "must have at most {max_length} entries",
        "too_short": "must have at least {min_length} entry",
        "string_pattern_mismatch": "must match {pattern}",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    return _TYPES.get(kind, fallback[:1].lower() + fallback[1:])


def _seen(value: Any) -> str:
    """The value, if it is short enough to help."""
    if isinstance(value, dict | list | BaseModel):
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text if len(text) <= 80 else text[:77] + '...'}: "


def _fields(model: type[BaseModel], path: Path) -> list[str]:
    """Names that are allowed at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        found = next((info for name, info in model.model_fields.items() if part in (name, info.alias)), None)
        inner = _inner_model(found.annotation) if found else None
        if inner is None:
            return []
        model = inner
    return [info.alias or name for name, info in model.model_fields.items()]


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside Optional, list and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _inner_model(argument)) is not None:
            return found
    return None
