"""Whether a chat template does nothing with the texts of messages but copy them: then what it puts around them is the same
for all texts, and a conversation need not be rendered to know its rendering.

Two things together show it. The template's code is made of such parts alone as copy a text, or ask the text itself before
they do anything else with it: no loop over characters, no filter that reads, no joining that would make another text of it.
And a rendering of texts that note when they are asked for anything: they may be put out, added to, and trimmed, as they
have no space at their ends, and be held for true, as they are not empty. So the way through the template, seen once for a
row of roles, was chosen by nothing that a text holds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_HARMLESS: Final = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Const,
    nodes.Name,
    nodes.NSRef,
    nodes.For,
    nodes.If,
    nodes.CondExpr,
    nodes.Break,
    nodes.Continue,
    nodes.Assign,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.Add,
    nodes.Sub,
    nodes.Neg,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Test,
    nodes.List,
    nodes.Tuple,
    nodes.Keyword,
)
"""Parts of a template that copy texts, or ask them through Python's own operators, which the texts notice."""
_FILTERS: Final = {"trim", "length", "default"}
_FUNCTIONS: Final = {"raise_exception", "namespace", "range", "strftime_now"}
_METHODS: Final = {"strip", "trim", "startswith", "endswith", "split", "lstrip", "rstrip", "append", "get", "items"}
_TESTS: Final = {"defined", "undefined", "none", "string", "true", "false", "mapping", "boolean", "iterable", "sequence"}


class _Generation(Extension):
    """What transformers lets a template mark as generated is ordinary text."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Environment:
    """What transformers compiles chat templates in (utils/chat_template_utils.py), for those that only copy: to import it
    takes a second."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _now
    return made


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def copies_only(source: str) -> bool:
    """Whether a template's code is made of harmless parts."""
    try:
        parsed = environment().parse(source)
    except TemplateError:
        return False
    written = {id(part) for output in parsed.find_all(nodes.Output) for one in output.nodes for part in _added(one)}
    return all(_harmless(node) or (id(node) in written and _is_json(node)) for node in _nodes(parsed))


def _added(node: nodes.Expr) -> list[nodes.Expr]:
    """What is put out one behind the other."""
    return [*_added(node.left), *_added(node.right)] if isinstance(node, nodes.Add) else [node]


def _is_json(node: nodes.Node) -> bool:
    """A text that is put out as JSON is not the one that was copied, if it has a quotation mark: that is seen."""
    return isinstance(node, nodes.Filter) and node.name == "tojson"


def _nodes(node: nodes.Node) -> list[nodes.Node]:
    return [node, *(below for child in node.iter_child_nodes() for below in _nodes(child))]


def _harmless(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS and not node.dyn_args and all(isinstance(one, nodes.Const) for one in node.args)
    if isinstance(node, nodes.Call):
        return _harmless_call(node)
    if isinstance(node, nodes.Mod):  # of numbers; of a text it would format
        return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
    if isinstance(node, nodes.Compare):  # a text in another text is not asked
        within = [one for one in node.ops if one.op in ("in", "notin")]
        return not within or (len(node.ops) == 1 and _is_asked(node.expr, within[0].expr))
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, (nodes.Getattr, nodes.NSRef)):
        return not node.attr.startswith("_")
    if isinstance(node, nodes.Keyword):
        return not node.key.startswith("_")
    return isinstance(node, _HARMLESS)


def _is_asked(left: nodes.Expr, right: nodes.Expr) -> bool:
    return isinstance(left, nodes.Const) or isinstance(right, (nodes.List, nodes.Tuple))


def _harmless_call(node: nodes.Call) -> bool:
    if node.dyn_args or node.dyn_kwargs:
        return False
    if isinstance(node.node, nodes.Name):
        return node.node.name in _FUNCTIONS
    constant = all(isinstance(one, nodes.Const) for one in node.args) and not node.kwargs
    return isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS and constant


class Noted:
    """What was asked of some texts."""

    def __init__(self) -> None:
        self.asked = False

    def text(self, value: str) -> str:
        """A text that notes it when it is asked for what it holds."""
        found = _Text(value)
        found.noted = self
        return found


class _Text(str):
    """Not empty, and without space at its ends. Whatever is not defined here notes that it was asked for."""

    noted: Noted

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: str) -> str:
        return self.noted.text(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return self.noted.text(str.__add__(other, self))

    def strip(self, chars: str | None = None, /) -> str:
        if chars is not None:
            self.noted.asked = True
        return self


def _noting(name: str) -> Callable[..., Any]:
    of_text: Callable[..., Any] = getattr(str, name)

    def asked(self: _Text, *arguments: Any, **named: Any) -> Any:
        self.noted.asked = True
        return of_text(self, *arguments, **named)

    return asked


_OWN: Final = set(vars(_Text)) | set(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
for _name in sorted(set(dir(str)) - _OWN):
    setattr(_Text, _name, _noting(_name))


def unasked(render: Callable[[Sequence[dict[str, Any]]], str | None], messages: Sequence[dict[str, Any]]) -> str | None:
    """The rendering of messages, or None where one of their texts was asked for what it holds."""
    noted = Noted()
    found = render([{**message, "content": noted.text(message["content"])} for message in messages])
    return None if noted.asked else found
