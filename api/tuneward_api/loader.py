"""The one YAML loader, for every door.

PyYAML reads YAML 1.1: `1e-4` is a string, `010` is 8, `on` is true, and the last of two equal keys wins.
kubectl and the API server read JSON's numbers and refuse what is ambiguous. This loader reads what they read,
and keeps the line of every value, so that a message can say where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]


class YamlError(Exception):
    """The text is not YAML as Kubernetes reads it; the message begins with file and line."""


@dataclass(frozen=True)
class Document:
    """One document of a YAML stream, with the line (from 1) of every key and list item."""

    value: Any
    file: str
    line: int
    lines: dict[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """Line of `path`, or of its nearest parent that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, self.line)


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises. Its resolvers are its own: the class attribute is shared otherwise."""


_Loader.yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    text = loader.construct_scalar(node).lower()
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        raise _at(node, f"{text} is ambiguous (octal or decimal?); write it without leading zeros or quote it")
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise _at(node, f"{text} is no number that JSON can hold")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def load_documents(text: str, *, file: str = "<text>") -> list[Document]:
    """Every document of a stream that is not empty.

    Raises YamlError for bad syntax, duplicate keys, numbers that JSON lacks, and keys that are not strings.
    """
    loader = _Loader(text)
    loader.name = file
    found = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            lines: dict[Path, int] = {}
            _walk(node, (), lines)
            value = loader.construct_document(node)
            if value is not None:
                found.append(Document(value=value, file=file, line=node.start_mark.line + 1, lines=lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise YamlError(f"{file}:{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{file}: {error}") from error
    finally:
        loader.dispose()
    return found


def _walk(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    """Notes lines and refuses duplicate keys, before aliases and merges are resolved."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, item in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _at(key, f"key {getattr(key, 'value', '?')!r} must be a string; quote it")
            if key.value in seen:
                raise _at(key, f"duplicate key {key.value!r} in {_show(path)}")
            seen.add(key.value)
            lines[(*path, key.value)] = key.start_mark.line + 1
            _walk(item, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines)


def _show(path: Path) -> str:
    return show_path(path) or "the document"


def show_path(path: Path) -> str:
    """`("spec", "datasets", 0, "uri")` -> `spec.datasets[0].uri`, as the API server writes it."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
