"""Reading what another version of us may have written: what cannot be read is left out, item by item."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from pydantic import ValidationError

from tuneward_api.base import Model, Record

M = TypeVar("M", bound=Model)
R = TypeVar("R", bound=Record)

ROUNDS = 20


def tolerant(model: type[M], value: dict[str, Any]) -> M:
    """`value` as far as this version knows it. Raises ValidationError where a required part is missing."""
    for _ in range(ROUNDS):
        try:
            return model.model_validate(value)
        except ValidationError as error:
            value = copy.deepcopy(value)
            dropped = [_drop(value, found["loc"]) for found in error.errors(include_url=False)]
            if True not in dropped:
                raise
    return model.model_validate(value)


def parse(model: type[R], text: str) -> R | None:
    """A termination message; None where it is none of ours."""
    if not text.startswith("{"):
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError:
        return None


def _drop(value: Any, path: tuple[int | str, ...]) -> bool:
    """Removes what `path` names. Parts of a path that name no key (a union's branch, a missing field) end the walk."""
    parent: Any = None
    step: int | str = ""
    for part in path:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and int(part) < len(value)
        if not known:
            break
        parent, step, value = value, part, value[part]
    if parent is None:
        return False
    del parent[step]
    return True
