"""From a line's object to a sample: which format it is, and whether every field is one that can be learnt from.

Here stands what is true for every model; what the model's chat template does with a sample is render.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from tuneward_api.datasets import DataFormat
from tuneward_trainer.data.calls import parse
from tuneward_trainer.data.messages import Weighed, answer_of, read_message, read_messages, text_of, tools_of
from tuneward_trainer.data.problems import SampleError, show

Format: TypeAlias = DataFormat


class Fields(NamedTuple):
    """What a sample of a format must have, and what it may have."""

    needed: tuple[str, ...]
    allowed: tuple[str, ...] = ()


FORMATS: Final[dict[Format, Fields]] = {
    "Preference": Fields(("chosen", "rejected"), ("prompt", "tools")),
    "PreferredOutput": Fields(("input", "preferred_output", "non_preferred_output")),
    "Messages": Fields(("messages",), ("tools",)),
    "PromptCompletion": Fields(("prompt", "completion"), ("tools",)),
    "Conversations": Fields(("conversations",), ("system", "tools")),
    "Instruction": Fields(("instruction", "output"), ("input", "system")),
    "Text": Fields(("text",)),
}
"""In the order of their recognition: files of pairs have the chosen answer as `messages` too, and Alpaca's a `text` beside
the instruction, rendered for another model."""
MEANT: Final = frozenset(
    {
        "functions",
        "documents",
        "images",
        "videos",
        "audio",
        "chat_template_kwargs",
        "weight",
        "rejected",
        "system",
        "history",
    }
)
"""Fields beside a sample that somebody means to be learnt from, and that nothing here reads. Others are notes."""
SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of who speaks, and those of sets that were made after it."""
_ENTRY: Final = {"role": "from", "content": "value"}
_CALL: Final = '{"name": …, "arguments": …}, or its JSON text'


@dataclass(frozen=True)
class Chat:
    """`messages` as the chat template gets them; `weights` one a message: 1 learns it, 0 does not.

    Only assistant turns have a weight that is not 0. `field` is the sample's field that holds the messages, `paths`
    where each message stands if that is not in one list.
    """

    messages: list[dict[str, Any]]
    weights: list[int]
    tools: list[dict[str, Any]] | None = None
    field: str = "messages"
    paths: tuple[str, ...] = ()

    def path(self, index: int) -> str:
        return self.paths[index] if self.paths else f"{self.field}[{index}]"


@dataclass(frozen=True)
class PromptCompletion:
    """`field` is the sample's field that holds the completion."""

    prompt: str
    completion: str
    field: str = "completion"


@dataclass(frozen=True)
class Text:
    text: str


Sample: TypeAlias = Chat | PromptCompletion | Text


def renamed(value: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The object with its columns under our names. A column that has one of ours by chance makes way."""
    if not fields:
        return value
    taken = set(fields.values())
    return {fields.get(key, key): item for key, item in value.items() if key in fields or key not in taken}


def detect(value: dict[str, Any]) -> Format:
    """Told from the fields of the first sample. Raises SampleError."""
    for form, fields in FORMATS.items():
        if all(key in value for key in fields.needed):
            return form
    allowed = "; ".join(" and ".join(fields.needed) for fields in FORMATS.values())
    raise SampleError("", f"has the fields {show(sorted(value))}", f"{allowed}; or name yours in the dataset's `fields`")


def check_fields(value: dict[str, Any], form: Format) -> None:
    """Raises SampleError where one is missing, or would not be learnt from."""
    needed, allowed = FORMATS[form]
    for key in needed:
        if key not in value:
            raise SampleError(key, "is missing", f"every sample of a source has the format of its first ({form})")
    for key in sorted(MEANT & value.keys()):
        if key not in needed + allowed and value[key] is not None:
            raise SampleError(key, "would not be learnt from", f"only {', '.join(needed + allowed)}")


def read(value: dict[str, Any], form: Format) -> Sample:
    """Of any format but those of pairs (pairs.py). Raises SampleError with the first thing that is wrong."""
    check_fields(value, form)
    if form == "Text":
        return Text(text_of(value["text"], "text"))
    if form == "Instruction":
        return _instruction(value)
    tools = tools_of(value.get("tools"))
    if form == "Conversations":
        return _conversation(value, tools)
    if form == "Messages":
        return _chat(read_messages(value["messages"], "messages"), tools)
    return _prompt_completion(value["prompt"], value["completion"], tools)


def ignored(value: dict[str, Any], form: Format) -> list[str]:
    """Fields beside the sample that are neither read nor refused: ids, sources, scores."""
    known = {*FORMATS[form].needed, *FORMATS[form].allowed, *MEANT}
    return [key for key in value if key not in known]


def _chat(messages: list[Weighed], tools: list[dict[str, Any]] | None, field: str = "messages", *paths: str) -> Chat:
    return Chat([message for message, _ in messages], [weight for _, weight in messages], tools, field, paths)


def _prompt_completion(prompt: Any, completion: Any, tools: list[dict[str, Any]] | None) -> Sample:
    """Two texts, or two lists of messages: then the completion is what is learnt."""
    if not isinstance(prompt, list):
        if tools:
            raise SampleError("tools", "would not be learnt from", "tools belong to messages")
        return PromptCompletion(text_of(prompt, "prompt", empty=True), answer_of(completion, "completion"))
    before, after = read_messages(prompt, "prompt"), read_messages(completion, "completion")
    paths = [f"prompt[{i}]" for i in range(len(before))] + [f"completion[{i}]" for i in range(len(after))]
    return _chat([(message, 0) for message, _ in before] + after, tools, "completion", *paths)


def _instruction(value: dict[str, Any]) -> Chat:
    """Alpaca's: a user turn of the instruction and, below an empty line, its input; and the answer."""
    asked = text_of(value["instruction"], "instruction")
    given = text_of(value.get("input") or "", "input", empty=True)
    turns = [
        ("system", text_of(value.get("system") or "", "system", empty=True)),
        ("instruction", f"{asked}\n\n{given}" if given.strip() else asked),
        ("output", answer_of(value["output"], "output")),
    ]
    roles = {"system": "system", "instruction": "user", "output": "assistant"}
    messages = [({"role": roles[path], "content": content}, int(path == "output")) for path, content in turns if content]
    return _chat(messages, None, "output", *[path for path, content in turns if content])


def _conversation(value: dict[str, Any], tools: list[dict[str, Any]] | None) -> Chat:
    """ShareGPT's `from` and `value`. Entries that have role and content are messages by another name."""
    system = text_of(value.get("system") or "", "system", empty=True)
    found = read_messages(value["conversations"], "conversations", _entry)
    if not system:
        return _chat(found, tools, "conversations")
    paths = [f"conversations[{index}]" for index in range(len(found))]
    return _chat([({"role": "system", "content": system}, 0), *found], tools, "conversations", "system", *paths)


def _entry(value: Any, path: str) -> Weighed:
    if not isinstance(value, dict):
        raise SampleError(path, f"is {show(value)}", "an object with from and value")
    if "from" not in value:
        if "role" in value:
            return read_message(value, path)
        raise SampleError(f"{path}.from", "is missing", ", ".join(SPEAKERS))
    speaker = value["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise SampleError(f"{path}.from", f"is {show(speaker)}", ", ".join(SPEAKERS))
    for key in ("role", "content"):
        if value.get(key) is not None:
            raise SampleError(f"{path}.{key}", f"stands beside {_ENTRY[key]}", "one of both")
    own = {"from": "role", "value": "content"}
    message = {own.get(key, key): item for key, item in value.items() if key not in own.values()}
    message["role"] = SPEAKERS[speaker]
    if speaker == "function_call":
        message |= {"content": None, "tool_calls": _function_calls(value.get("value"), f"{path}.value")}
    try:
        return read_message(message, path)
    except SampleError as error:
        raise error.called(_ENTRY) from error


def _function_calls(value: Any, path: str) -> list[dict[str, Any]]:
    """The calls that stand in a turn of function_call."""
    if isinstance(value, str):
        value = parse(value, path, _CALL)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise SampleError(path, f"is {show(value)}", _CALL)
    return [{"type": "function", "function": call} for call in calls]
