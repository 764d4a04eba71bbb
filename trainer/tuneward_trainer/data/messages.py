"""One message of a conversation, as OpenAI's and mistral-finetune's files have it: what a chat template can render."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from tuneward_trainer.data.calls import arguments_of, parse
from tuneward_trainer.data.problems import SampleError, show

Weighed: TypeAlias = tuple[dict[str, Any], int]
"""A message as the chat template gets it, and its weight: 1 learns it, 0 does not."""

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_ROLES: Final = frozenset(ROLES)
FIELDS: Final = (
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_TEXT: Final = "a text"
_TOOLS: Final = "a list of tools, or its JSON text"


def read_messages(value: Any, path: str, read: Callable[[Any, str], Weighed] | None = None) -> list[Weighed]:
    """`read` reads one entry. Raises SampleError with what is wrong with each."""
    if not isinstance(value, list) or not value:
        raise SampleError(path, f"is {show(value)}", "a list of at least one message")
    if read is None and (plain := _plain(value)) is not None:
        return plain
    messages, errors = [], []
    for index, message in enumerate(value):
        try:
            messages.append((read or read_message)(message, f"{path}[{index}]"))
        except SampleError as error:
            errors.append(error)
    if errors:
        raise SampleError.of(errors)
    return messages


def read_message(value: Any, path: str) -> Weighed:
    """A message without nulls (which tables write for absent fields) and its weight. Raises SampleError."""
    if not isinstance(value, dict):
        raise SampleError(path, f"is {show(value)}", "an object with role and content")
    for key in value:
        if key not in FIELDS and value[key] is not None:
            raise SampleError(f"{path}.{key}", "is a field that no template reads", ", ".join(FIELDS))
    role = value.get("role")
    if role not in ROLES:
        raise SampleError(f"{path}.role", f"is {show(role)}" if "role" in value else "is missing", ", ".join(ROLES))
    weight = _weight(value, path, role)
    message = {key: item for key, item in value.items() if item is not None and key != "weight"}
    calls = _calls(message.get("tool_calls"), f"{path}.tool_calls")
    if calls and role != "assistant":
        raise SampleError(f"{path}.tool_calls", f"belongs to a turn of {role}", "tool_calls of an assistant turn")
    message["content"] = _content(value.get("content"), f"{path}.content", "content" in value, role, bool(calls), weight)
    if calls:
        message["tool_calls"] = calls
    else:
        message.pop("tool_calls", None)
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if key in message:
            text_of(message[key], f"{path}.{key}", empty=True)
    return message, weight


def _plain(messages: list[Any]) -> list[Weighed] | None:
    """What most conversations are, of which nothing is to be said: roles and texts that are not blank; or None."""
    try:
        roles = [message["role"] for message in messages if len(message) == 2]
        texts = [message["content"] for message in messages]
        "".join(texts).encode()
        known = set(roles) <= _ROLES
    except (TypeError, KeyError, UnicodeEncodeError):
        return None
    if not known or len(roles) < len(texts) or [text for text in texts if not text or text.isspace()]:
        return None
    return list(zip(messages, [1 if role == "assistant" else 0 for role in roles], strict=True))


def _weight(value: dict[str, Any], path: str, role: str) -> int:
    weight = value.get("weight")
    if weight is None:
        return int(role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise SampleError(f"{path}.weight", f"is {show(weight)}", "0 or 1")
    if weight and role != "assistant":
        raise SampleError(f"{path}.weight", f"is {show(weight)} on a turn of {role}", "1 on assistant turns only")
    return int(weight)


def _content(value: Any, path: str, present: bool, role: str, calls: bool, weight: int) -> str:
    """The message's text. A list of text parts is joined as engines join it."""
    if value is None and calls:
        return ""
    if not present:
        raise SampleError(path, "is missing", _TEXT)
    if isinstance(value, list):
        value = "\n".join(_part(part, f"{path}[{index}]") for index, part in enumerate(value))
    text = text_of(value, path, empty=True)
    if role == "assistant" and weight and not calls and not text.strip():
        raise SampleError(path, _silent(text), "a text, or weight 0")
    return text


def _silent(text: str) -> str:
    return f"is {show(text)}: the model would learn to say nothing"


def answer_of(value: Any, path: str) -> str:
    """What is learnt of a sample without messages. Raises SampleError where it is no text, or blank."""
    text = text_of(value, path)
    if not text.strip():
        raise SampleError(path, _silent(text), _TEXT)
    return text


def _part(value: Any, path: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise SampleError(
            path, f"is a part of type {show(kind)}", 'parts of type "text"; images and sound are not learnt from'
        )
    return text_of(value.get("text"), f"{path}.text", empty=True)


def text_of(value: Any, path: str, *, empty: bool = False) -> str:
    """Raises SampleError where it is no text, or empty and must not be."""
    if not isinstance(value, str):
        raise SampleError(path, f"is {show(value)}", _TEXT)
    if not empty and not value:
        raise SampleError(path, "is empty", _TEXT)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            path, f"holds half a character at {error.start + 1} (a lone surrogate)", "whole characters"
        ) from error
    return value


def _calls(value: Any, path: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleError(path, f"is {show(value)}", "a list of calls")
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(value)]


def _call(value: Any, path: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SampleError(path, f"is {show(value)}", '{"type": "function", "function": {"name": …, "arguments": …}}')
    arguments = arguments_of(function.get("arguments"), f"{path}.function.arguments")
    return {**value, "function": {**function, "arguments": arguments}}


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Tools may be given as a JSON text: tables have no column of changing shape."""
    if isinstance(value, str):
        value = parse(value, "tools", _TOOLS)
    if value in (None, []):
        return None
    if not isinstance(value, list):
        raise SampleError("tools", f"is {show(value)}", _TOOLS)
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value)]


def _tool(value: Any, path: str) -> dict[str, Any]:
    """As vLLM hands it to the template, whatever order the data has: type and function, and of the function name,
    description and parameters first, null where they are absent. A bare function is one that a client has to wrap."""
    bare = isinstance(value, dict) and "function" not in value and "name" in value
    function = value if bare else value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SampleError(path, f"is {show(value)}", '{"type": "function", "function": {"name": …, "parameters": …}}')
    text_of(function.get("description") or "", f"{path}.function.description", empty=True)
    if not isinstance(function.get("parameters") or {}, dict):
        raise SampleError(f"{path}.function.parameters", f"is {show(function['parameters'])}", "a JSON schema")
    first = {"name": function["name"], "description": None, "parameters": None}
    around = {} if bare else {key: item for key, item in value.items() if key not in ("type", "function")}
    return {"type": "function", "function": first | {k: v for k, v in function.items() if not bare or k != "type"}, **around}
