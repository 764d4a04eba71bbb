"""From a line's object to a sample: which format it is, and whether every field is one that can be learnt from.

Here stands what is true for every model; what the model's chat template does with a sample is render.py's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from tuneward_trainer.data.problems import SampleError, show

Format: TypeAlias = Literal["Messages", "PromptCompletion", "Text"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS: Final = (
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
FIELDS: Final[dict[Format, tuple[str, ...]]] = {
    "Messages": ("messages", "tools"),
    "PromptCompletion": ("prompt", "completion", "tools"),
    "Text": ("text",),
}
MEANT: Final = frozenset(
    {"functions", "documents", "images", "videos", "audio", "chat_template_kwargs", "weight", "rejected"}
)
"""Fields beside a sample that somebody means to be learnt from, and that nothing here reads. Others are notes."""
_TEXT: Final = "a text"


@dataclass(frozen=True)
class Chat:
    """`messages` as the chat template gets them; `weights` one a message: 1 learns it, 0 does not.

    Only assistant turns have a weight that is not 0.
    """

    messages: list[dict[str, Any]]
    weights: list[int]
    tools: list[dict[str, Any]] | None = None
    paths: tuple[str, ...] = ()

    def path(self, index: int) -> str:
        return self.paths[index] if self.paths else f"messages[{index}]"


@dataclass(frozen=True)
class PromptCompletion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


Sample: TypeAlias = Chat | PromptCompletion | Text


def detect(value: dict[str, Any]) -> Format:
    """Told from the fields of the first sample. Raises SampleError."""
    if "messages" in value:
        return "Messages"
    if "prompt" in value and "completion" in value:
        return "PromptCompletion"
    if "text" in value:
        return "Text"
    hint = "; for ShareGPT's conversations, rename from/value to role/content" if "conversations" in value else ""
    raise SampleError("", f"has the fields {show(sorted(value))}", "messages, prompt and completion, or text" + hint)


def read(value: dict[str, Any], form: Format) -> Sample:
    """Raises SampleError with the first thing that is wrong."""
    for key in FIELDS[form]:
        if key not in value and key != "tools":
            raise SampleError(key, "is missing", f"every sample of a source has the format of its first ({form})")
    for key in sorted(MEANT & value.keys()):
        if value[key] is not None:
            raise SampleError(key, "would not be learnt from", f"only {', '.join(FIELDS[form])}")
    if form == "Text":
        return Text(_text(value["text"], "text"))
    tools = _tools(value.get("tools"))
    if form == "Messages":
        messages = _messages(value["messages"], "messages")
        return Chat([message for message, _ in messages], [weight for _, weight in messages], tools)
    return _prompt_completion(value["prompt"], value["completion"], tools)


def ignored(value: dict[str, Any], form: Format) -> list[str]:
    """Fields beside the sample that are neither read nor refused: ids, sources, scores."""
    return [key for key in value if key not in FIELDS[form] and key not in MEANT]


def _prompt_completion(prompt: Any, completion: Any, tools: list[dict[str, Any]] | None) -> Sample:
    """Two texts, or two lists of messages: then the completion is what is learnt."""
    if not isinstance(prompt, list):
        if tools:
            raise SampleError("tools", "would not be learnt from", "tools belong to messages")
        return PromptCompletion(_text(prompt, "prompt", empty=True), _text(completion, "completion"))
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    return Chat(
        [message for message, _ in before + after],
        [0] * len(before) + [weight for _, weight in after],
        tools,
        tuple(f"prompt[{i}]" for i in range(len(before))) + tuple(f"completion[{i}]" for i in range(len(after))),
    )


def _messages(value: Any, path: str) -> list[tuple[dict[str, Any], int]]:
    if not isinstance(value, list) or not value:
        raise SampleError(path, f"is {show(value)}", "a list of at least one message")
    messages, errors = [], []
    for index, message in enumerate(value):
        try:
            messages.append(_message(message, f"{path}[{index}]"))
        except SampleError as error:
            errors.append(error)
    if errors:
        raise SampleError.of(errors)
    return messages


def _message(value: Any, path: str) -> tuple[dict[str, Any], int]:
    """A message without nulls (which tables write for absent fields) and its weight."""
    if not isinstance(value, dict):
        raise SampleError(path, f"is {show(value)}", "an object with role and content")
    for key in value:
        if key not in MESSAGE_FIELDS and value[key] is not None:
            raise SampleError(f"{path}.{key}", "is a field that no template reads", ", ".join(MESSAGE_FIELDS))
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
            _text(message[key], f"{path}.{key}", empty=True)
    return message, weight


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
    text = _text(value, path, empty=True)
    if role == "assistant" and weight and not calls and not text.strip():
        raise SampleError(path, f"is {show(text)}: the model would learn to say nothing", "a text, or weight 0")
    return text


def _part(value: Any, path: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise SampleError(
            path, f"is a part of type {show(kind)}", 'parts of type "text"; images and sound are not learnt from'
        )
    return _text(value.get("text"), f"{path}.text", empty=True)


def _text(value: Any, path: str, *, empty: bool = False) -> str:
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
    """Tool calls with their arguments as an object: engines parse OpenAI's JSON text before they render, so do we."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleError(path, f"is {show(value)}", "a list of calls")
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(value)]


def _call(value: Any, path: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SampleError(path, f"is {show(value)}", '{"type": "function", "function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise SampleError(
                f"{path}.function.arguments", f"is no JSON ({error})", "an object, or its JSON text"
            ) from error
    if arguments is not None and not isinstance(arguments, dict):
        raise SampleError(f"{path}.function.arguments", f"is {show(arguments)}", "an object, or its JSON text")
    return {**value, "function": {**function, "arguments": arguments or {}}}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools may be given as a JSON text: tables have no column of changing shape."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SampleError("tools", f"is no JSON ({error})", "a list of tools, or its JSON text") from error
    if value in (None, []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise SampleError("tools", f"is {show(value)}", "a list of tools, or its JSON text")
    return value
