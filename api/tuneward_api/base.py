"""The base of every model here, and the one way to state a rule.

A rule is written once and holds at both doors: as CEL in the CRD, so that `kubectl apply` refuses, and as a
Python check, so that `tuneward validate` refuses the same thing with the same sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule over a value: `cel` for the API server, `check` for Python, one message for people."""

    cel: str
    message: str
    check: Callable[[Any], bool]

    def as_cel(self) -> dict[str, str]:
        return {"rule": self.cel, "message": self.message}


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A rule over an update (`oldSelf`): the API server alone can hold it."""

    cel: str
    message: str

    def as_cel(self) -> dict[str, str]:
        return {"rule": self.cel, "message": self.message}


def broken(rule: Rule) -> PydanticCustomError:
    return PydanticCustomError("rule", "{reason}", {"reason": rule.message})


class Model(BaseModel):
    """camelCase outside, snake_case inside, unknown fields refused, never changed after it was made."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # An API server does not read "5" as 5; neither do we.
        strict=True,
    )

    RULES: ClassVar[tuple[Rule, ...]] = ()
    TRANSITIONS: ClassVar[tuple[Transition, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """A null is an absent field, as the API server has it."""
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        for rule in self.RULES:
            if not rule.check(self):
                raise broken(rule)
        return self

    def to_json(self) -> dict[str, Any]:
        """As the API server and the files on disk have it: camelCase, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Record(Model):
    """A file or report that another version of us may have written: unknown fields are kept out, not refused."""

    model_config = ConfigDict(extra="ignore", strict=False)


class Ruled:
    """Annotation for a scalar, list or map that must hold `rules`; the generator finds them in the schema."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def _hold(self, value: Any) -> Any:
        for rule in self.rules:
            if not rule.check(value):
                raise broken(rule)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._hold, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "x-kubernetes-validations": [rule.as_cel() for rule in self.rules]}


def _integral(value: Any) -> Any:
    """Helm writes 1048576 as 1.048576e+06, and the API server takes it as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_integral)]

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)


def _quantity(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError("quantity", "must be a quantity such as 2, 500m or 4Gi")
    if isinstance(value, str) and not re.match(QUANTITY_PATTERN, value):
        raise PydanticCustomError("quantity", "must be a quantity such as 2, 500m or 4Gi")
    return value


Quantity = Annotated[
    int | str,
    BeforeValidator(_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY_PATTERN,
        }
    ),
]
