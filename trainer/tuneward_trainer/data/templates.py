"""A tokenizer's own chat template, as it renders for an engine and as it renders plain turns in less time.

Both can be sent to another process, which imports transformers only when it renders: that takes more than a second, and what
the processes of prepare are given mostly needs no rendering (shapes.py).
"""

from __future__ import annotations

import functools
import pickle
from typing import Any

from jinja2 import TemplateError

from tuneward_trainer.data.copies import copies_only, environment
from tuneward_trainer.data.render import Template
from tuneward_trainer.data.shapes import Messages, Quick

REFUSALS = (TemplateError, TypeError, KeyError, ValueError, AttributeError)
"""What templates raise on messages that they do not render."""


class Held:
    """A tokenizer of transformers, which another process reads once it asks for it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pickled = b""

    def __call__(self) -> Any:
        if self._pickled:
            self._tokenizer, self._pickled = pickle.loads(self._pickled), b""
        return self._tokenizer

    def __getstate__(self) -> bytes:
        return self._pickled or pickle.dumps(self._tokenizer)

    def __setstate__(self, state: bytes) -> None:
        self._tokenizer, self._pickled = None, state


def chat_template(held: Held) -> Template | None:
    """The model's own, or None where it has none."""
    if not held().chat_template:
        return None
    plain, parts = _Template(held), _Template(held, in_parts=True)
    return parts if _reads_parts_only(plain, parts) else plain


def quick_template(held: Held) -> Quick | None:
    """The compiled template without what `apply_chat_template` does to every message before: nothing to plain turns, but
    it takes ten times as long. Who uses it proves that both agree. None where transformers has it under another name."""
    source, variables = held().chat_template, held().special_tokens_map
    if not isinstance(source, str) or not source:
        return None
    try:
        _compile(source)
    except (ImportError, TemplateError):
        return None
    return _Quick(source, variables)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    """One that only copies needs no more of its environment than jinja2 gives; others are third parties' code, for which
    transformers has further locks."""
    if copies_only(source):
        return environment().from_string(source)
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


class _Template:
    """`in_parts`: texts are given as lists of one part."""

    def __init__(self, held: Held, *, in_parts: bool = False) -> None:
        self._held = held
        self._in_parts = in_parts

    def __call__(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        if self._in_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        render = self._held().apply_chat_template
        return str(render(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))


class _Quick:
    """Compiled when it is first used."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        self._state = source, variables
        self._compiled: Any = None

    def __reduce__(self) -> tuple[type[_Quick], tuple[str, dict[str, Any]]]:
        return _Quick, self._state

    def __call__(self, messages: Messages, prompt: bool) -> str | None:
        source, variables = self._state
        given = {**variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            self._compiled = self._compiled or _compile(source)
            return str(self._compiled.render(given))
        except REFUSALS:
            return None


def _reads_parts_only(render: Template, render_parts: Template) -> bool:
    """Whether a template, as some of models that see, renders a list of parts and nothing of a plain text."""
    probe = [{"role": "user", "content": "Tuneward"}]
    found = []
    for way in (render, render_parts):
        try:
            found.append("Tuneward" in way(probe, None, False))
        except REFUSALS:
            found.append(False)
    return found == [False, True]
