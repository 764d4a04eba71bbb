"""Two answers to one prompt, as TRL's and OpenAI's files have them: samples of which the model learns to prefer one.

Each side is an ordinary sample, rendered as it would be for supervised training, and what both share is not learnt. So a
pair becomes two documents that begin with the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from tuneward_api.objective import PAIRS
from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.formats import Chat, Format, PromptCompletion
from tuneward_trainer.data.messages import Weighed, read_messages, text_of, tools_of
from tuneward_trainer.data.problems import SampleError, show

Side: TypeAlias = Chat | PromptCompletion
Answer: TypeAlias = tuple[str, list[Weighed], list[str]]
"""(the sample's field, the prompt's messages and the answer's, where each stands)."""

_DIFFER: Final = "two answers that differ"
_SAME_PROMPT: Final = "the same prompt in both, up to the turn of assistant in which they differ"


@dataclass(frozen=True)
class Pair:
    """The better answer and the worse one."""

    chosen: Side
    rejected: Side


Sample: TypeAlias = formats.Sample | Pair


def sides(sample: Sample) -> tuple[formats.Sample, ...]:
    """What is rendered of a sample: itself, or both answers of a pair."""
    return (sample.chosen, sample.rejected) if isinstance(sample, Pair) else (sample,)


def joined(sample: Sample, found: Sequence[list[Encoded] | SampleError]) -> list[Encoded]:
    """The documents of a sample from those of its sides. Raises SampleError."""
    errors = [side for side in found if isinstance(side, SampleError)]
    if errors:
        raise SampleError.of(errors)
    encoded = [side for side in found if not isinstance(side, SampleError)]
    if not isinstance(sample, Pair):
        return encoded[0]
    for side, documents in zip((sample.chosen, sample.rejected), encoded, strict=True):
        if len(documents) > 1:
            raise SampleError(
                side.field,
                "has several turns of assistant, and the chat template changes earlier ones",
                "answers of one turn with this model",
            )
    (chosen,), (rejected,) = encoded
    if np.array_equal(chosen.ids, rejected.ids):
        raise SampleError(sample.rejected.field, f"gives the same tokens as {sample.chosen.field}", _DIFFER)
    return [chosen, rejected]


def read(value: dict[str, Any], form: Format) -> Sample:
    """A sample of any format. Raises SampleError with the first thing that is wrong."""
    if form not in PAIRS:
        return formats.read(value, form)
    formats.check_fields(value, form)
    return _preference(value) if form == "Preference" else _preferred_output(value)


def _preference(value: dict[str, Any]) -> Pair:
    """TRL's: three texts, three lists of messages, or two whole conversations, with or without their prompt beside them."""
    chosen, rejected, prompt = value["chosen"], value["rejected"], value.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise SampleError("rejected", f"is {show(rejected)}", "two texts, or two lists of messages")
    if not isinstance(chosen, list):
        return _texts(prompt, chosen, rejected, value)
    tools = tools_of(value.get("tools"))
    answers = {name: read_messages(value[name], name) for name in ("chosen", "rejected")}
    before = [] if prompt is None else _prompt(prompt)
    found = [_behind(before, name, messages) for name, messages in answers.items()]
    return _pair(found[0], found[1], tools)


def _texts(prompt: Any, chosen: Any, rejected: Any, value: dict[str, Any]) -> Pair:
    if prompt is None:
        raise SampleError("prompt", "is missing", "a text; only lists of messages may begin with the prompt instead")
    if tools_of(value.get("tools")):
        raise SampleError("tools", "would not be learnt from", "tools belong to messages")
    asked = text_of(prompt, "prompt", empty=True)
    found = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not text_of(answer, name).strip():
            raise SampleError(name, f"is {show(answer)}: no answer", "a text")
        found.append(PromptCompletion(asked, answer, name))
    if chosen == rejected:
        raise SampleError("rejected", "is the same as chosen", _DIFFER)
    return Pair(*found)


def _prompt(value: Any) -> list[Weighed]:
    if isinstance(value, str):
        return [({"role": "user", "content": text_of(value, "prompt")}, 0)]
    return read_messages(value, "prompt")


def _behind(before: list[Weighed], name: str, messages: list[Weighed]) -> Answer:
    """The answer behind its prompt. One that does not begin with a turn of assistant is a whole conversation already."""
    if messages[0][0]["role"] != "assistant":
        if not {_turn(message) for message in before} <= {_turn(message) for message in messages}:
            raise SampleError(name, "does not hold what prompt says", "answers alone, or behind that very prompt")
        return name, messages, [f"{name}[{index}]" for index in range(len(messages))]
    paths = [f"prompt[{index}]" for index in range(len(before))] + [f"{name}[{index}]" for index in range(len(messages))]
    return name, [*before, *messages], paths


def _turn(message: Weighed) -> tuple[str, str]:
    return message[0]["role"], message[0]["content"].strip()


def _preferred_output(value: dict[str, Any]) -> Pair:
    """OpenAI's: https://platform.openai.com/docs/guides/direct-preference-optimization."""
    given = value["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise SampleError("input", f"is {show(given)}", "an object with messages and, if any, tools")
    for key in given:
        if key not in ("messages", "tools", "parallel_tool_calls") and given[key] is not None:
            raise SampleError(f"input.{key}", "would not be learnt from", "only messages, tools")
    before = read_messages(given["messages"], "input.messages")
    try:
        tools = tools_of(given.get("tools"))
    except SampleError as error:
        raise error.called({"tools": "input.tools"}, first=True) from error
    found = []
    for name in ("preferred_output", "non_preferred_output"):
        messages = read_messages(value[name], name)
        if messages[0][0]["role"] != "assistant":
            raise SampleError(f"{name}[0].role", f"is {show(messages[0][0]['role'])}", "assistant")
        paths = [f"input.messages[{i}]" for i in range(len(before))] + [f"{name}[{i}]" for i in range(len(messages))]
        found.append((name, [*before, *messages], paths))
    return _pair(found[0], found[1], tools)


def _pair(chosen: Answer, rejected: Answer, tools: list[dict[str, Any]] | None) -> Pair:
    """What both share is the prompt, and is not learnt."""
    (better, ours, _), (worse, theirs, paths) = chosen, rejected
    shared = _shared(ours, theirs)
    if shared == len(ours) == len(theirs):
        raise SampleError(worse, f"is the same as {better}", _DIFFER)
    if shared in (len(ours), len(theirs)):
        shorter, longer = (better, worse) if shared == len(ours) else (worse, better)
        raise SampleError(shorter, f"has no answer of its own: {longer} only goes on from it", _SAME_PROMPT)
    roles = {ours[shared][0]["role"], theirs[shared][0]["role"]}
    if roles != {"assistant"}:
        raise SampleError(paths[shared], f"is not the prompt of {better}", _SAME_PROMPT)
    if not shared:
        raise SampleError("prompt", "is missing", "a prompt, here or at the beginning of both conversations")
    return Pair(_side(chosen, shared, tools), _side(rejected, shared, tools))


def _shared(one: list[Weighed], other: list[Weighed]) -> int:
    """How many messages both begin with."""
    differs = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a[0] != b[0])
    return next(differs, min(len(one), len(other)))


def _side(answer: Answer, shared: int, tools: list[dict[str, Any]] | None) -> Chat:
    name, messages, paths = answer
    weights = [0 if index < shared else weight for index, (_, weight) in enumerate(messages)]
    return Chat([message for message, _ in messages], weights, tools, name, tuple(paths))
