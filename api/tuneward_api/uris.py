"""The addresses that `model.uri` and `datasets.*[].uri` may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from tuneward_api.base import Rule, Ruled

_NAME: Final = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_BASE: Final = rf"hf://[^/@\s]+/[^/@\s]+(@[^/@\s]+)?|pvc://{_NAME}/[^\s]+"
BASE_PATTERN: Final = rf"^({_BASE})$"
MODEL_PATTERN: Final = rf"^({_BASE}|model://{_NAME})$"
DATA_PATTERN: Final = rf"^(configmap://{_NAME}/[-._a-zA-Z0-9]+|pvc://{_NAME}/[^\s]+)$"

BASE_RULE: Final = Rule(
    cel=f"self.matches(r'{BASE_PATTERN}')",
    message="must be hf://ORG/NAME[@REVISION] or pvc://CLAIM/PATH",
    check=lambda value: re.match(BASE_PATTERN, value) is not None,
)
MODEL_RULE: Final = Rule(
    cel=f"self.matches(r'{MODEL_PATTERN}')",
    message="must be hf://ORG/NAME[@REVISION], pvc://CLAIM/PATH, or model://NAME to go on from a FineTunedModel",
    check=lambda value: re.match(MODEL_PATTERN, value) is not None,
)
DATA_RULE: Final = Rule(
    cel=f"self.matches(r'{DATA_PATTERN}')",
    message="must be configmap://NAME/KEY or pvc://CLAIM/PATH",
    check=lambda value: re.match(DATA_PATTERN, value) is not None,
)
NO_PARENT_RULE: Final = Rule(
    cel="!self.contains('/../') && !self.endsWith('/..')",
    message="must not step out of its folder with ..",
    check=lambda value: "/../" not in value and not value.endswith("/.."),
)

BaseUri = Annotated[str, Field(max_length=512), Ruled(BASE_RULE, NO_PARENT_RULE)]
ModelUri = Annotated[str, Field(max_length=512), Ruled(MODEL_RULE, NO_PARENT_RULE)]
DataUri = Annotated[str, Field(max_length=512), Ruled(DATA_RULE, NO_PARENT_RULE)]


MODEL_SCHEME: Final = "model://"


@dataclass(frozen=True)
class Uri:
    """A parsed address. `authority` is the claim, the ConfigMap, the hub's organisation or the FineTunedModel, which has no
    path."""

    scheme: str
    authority: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.authority}{path}" + (f"@{self.revision}" if self.revision else "")


def parse_uri(text: str) -> Uri:
    """Raises ValueError for anything that is neither SCHEME://AUTHORITY/PATH nor model://NAME."""
    if text.startswith(MODEL_SCHEME) and "/" not in text.removeprefix(MODEL_SCHEME):
        return Uri("model", text.removeprefix(MODEL_SCHEME), "")
    match = re.match(r"^([a-z0-9]+)://([^/]+)/(.+)$", text)
    if match is None:
        raise ValueError(f"{text!r} is not an address of the form SCHEME://NAME/PATH")
    scheme, authority, path = match.groups()
    if scheme == "hf" and "@" in path:
        path, revision = path.rsplit("@", 1)
        return Uri(scheme, authority, path, revision)
    return Uri(scheme, authority, path)
