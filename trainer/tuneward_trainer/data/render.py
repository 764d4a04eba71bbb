"""From a sample to texts with the spans that are learnt, through the model's own chat template.

A conversation is one text where the template only ever appends: then each turn's prompt, as an engine would render it,
is a prefix of the whole. Where a template changes earlier turns (drops their reasoning, closes only the last), every
learnt turn becomes a text of its own, cut after it, so that the model sees what it will see at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from jinja2 import TemplateError

from tuneward_trainer.data.formats import Chat, PromptCompletion, Sample, Text
from tuneward_trainer.data.problems import SampleError

LossOn: TypeAlias = Literal["Assistant", "LastAssistant", "All"]
Span: TypeAlias = tuple[int, int]

_CARRIED: Final = ("reasoning_content", "reasoning", "thinking", "tool_calls")
"""Fields of a message whose text must reach the rendering. Ids of calls, and names of tools' answers, are links."""
_IGNORED: Final = "does not reach the text: the model's chat template ignores it"
_CUT: Final = "leave it out, or use a model whose chat template renders it"
_NO_TEMPLATE: Final = "prompt and completion, or text; or an instruct model, which has a chat template"


@dataclass(frozen=True)
class Rendered:
    """`spans`: the parts of `text`, in characters, that are learnt; `turns` says whether a stop token ends each.

    `parts`: places where the encoding is cut, as at inference the prompt is encoded alone. `raw`: a text without
    template, which gets the tokenizer's own first token.
    """

    text: str
    spans: tuple[Span, ...]
    turns: bool = True
    parts: tuple[int, ...] = ()
    raw: bool = False


Template: TypeAlias = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, bool], str]


class Renderer:
    """`template(messages, tools, generation_prompt) -> text` is the model's; None: it has none."""

    def __init__(self, template: Template | None, loss_on: LossOn) -> None:
        self._template = template
        self._loss_on = loss_on

    def render(self, sample: Sample) -> list[Rendered]:
        """One or several texts. Raises SampleError."""
        if isinstance(sample, Text):
            return [Rendered(sample.text, ((0, len(sample.text)),), turns=False, raw=True)]
        if isinstance(sample, PromptCompletion):
            if self._template is None:
                return [self._completion(sample)]
            sample = _as_chat(sample)
        return self._chat(sample, apart=False)

    def render_apart(self, sample: Sample) -> list[Rendered]:
        """As `render`, but every learnt turn a text of its own, its prompt encoded alone: for tokens that would
        reach across the end of a prompt."""
        if isinstance(sample, PromptCompletion):
            sample = _as_chat(sample)
        assert isinstance(sample, Chat)
        return self._chat(sample, apart=True)

    def _completion(self, sample: PromptCompletion) -> Rendered:
        text = sample.prompt + sample.completion
        cut = len(sample.prompt)
        start = 0 if self._loss_on == "All" else cut
        return Rendered(text, ((start, len(text)),), turns=False, parts=(cut,) if cut else (), raw=True)

    def _chat(self, chat: Chat, *, apart: bool) -> list[Rendered]:
        if self._template is None:
            raise SampleError("messages", "needs a chat template, and the model has none", _NO_TEMPLATE)
        conversation = _Conversation(chat, self._template)
        conversation.check_fields()
        if self._loss_on == "All":
            return [conversation.everything()]
        learnt = self._learnt(chat)
        if not apart and (whole := conversation.as_one(learnt)):
            return [whole]
        return [conversation.turn(index, cut=apart) for index in learnt]

    def _learnt(self, chat: Chat) -> list[int]:
        """Turns with a loss."""
        assistant = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not assistant:
            raise SampleError("messages", "has no assistant turn, so nothing to learn", "at least one assistant turn")
        chosen = [i for i in (assistant[-1:] if self._loss_on == "LastAssistant" else assistant) if chat.weights[i]]
        if not chosen:
            which = "the last assistant turn" if self._loss_on == "LastAssistant" else "every assistant turn"
            raise SampleError("messages", f"has nothing to learn: {which} has weight 0", "at least one turn of weight 1")
        return chosen


def _as_chat(sample: PromptCompletion) -> Chat:
    """With a chat template, a prompt is what a user says: so it is asked when the model is served."""
    return Chat(
        [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}],
        [0, 1],
        field="completion",
        paths=("prompt", "completion"),
    )


class _Conversation:
    """One conversation and its renderings."""

    def __init__(self, chat: Chat, template: Template) -> None:
        self.chat = chat
        self._template = template
        self._known: dict[tuple[int, bool], str] = {}

    def upto(self, count: int, *, prompt: bool = False) -> str:
        """The first `count` messages, with what an engine puts before an answer where `prompt` asks for it."""
        key = (count, prompt)
        if key not in self._known:
            self._known[key] = self._render(self.chat.messages[:count], self.chat.tools, prompt)
        return self._known[key]

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> str:
        try:
            return self._template(messages, tools, prompt)
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise SampleError(
                "messages", f"is refused by the model's chat template ({error})", "the turns that this template renders"
            ) from error

    def as_one(self, learnt: list[int]) -> Rendered | None:
        """The whole conversation up to the last learnt turn, or None where the template changes earlier turns."""
        whole = self.upto(learnt[-1] + 1)
        spans = []
        for index in learnt:
            self._must_follow_something(index)
            before, after = self.upto(index, prompt=True), self.upto(index + 1)
            if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
                return None
            spans.append((len(before), len(after)))
        return Rendered(whole, tuple(spans))

    def turn(self, index: int, *, cut: bool) -> Rendered:
        """The conversation up to turn `index`, which alone is learnt."""
        self._must_follow_something(index)
        text, start = self.upto(index + 1), self._start(index)
        return Rendered(text, ((start, len(text)),), parts=(start,) if cut else ())

    def _start(self, index: int) -> int:
        """Where the answer begins: after the generation prompt. Some templates put more into that than into a
        recorded answer (an opened or empty <think>): then after what the two share."""
        text, before, history = self.upto(index + 1), self.upto(index, prompt=True), self.upto(index)
        content = text.find(self.chat.messages[index]["content"].strip(), len(history))
        if content < 0 or not text.startswith(history):
            raise SampleError(
                self.chat.path(index),
                "cannot be learnt: the chat template renders what stands before it differently once it is answered",
                "a chat template whose prompt is the beginning of the answered conversation",
            )
        return len(before) if text.startswith(before) else max(len(history), min(_shared(text, before), content))

    def everything(self) -> Rendered:
        """lossOn All: the whole text but the assistant turns of weight 0."""
        whole = self.upto(len(self.chat.messages))
        left_out = []
        for index, message in enumerate(self.chat.messages):
            if message["role"] == "assistant" and not self.chat.weights[index]:
                self._must_follow_something(index)
                before, after = self.upto(index, prompt=True), self.upto(index + 1)
                if not (whole.startswith(before) and whole.startswith(after)):
                    raise SampleError(
                        f"{self.chat.path(index)}.weight",
                        "is 0, but the chat template changes earlier turns, so the turn has no fixed place",
                        "lossOn Assistant with this model",
                    )
                left_out.append((len(before), len(after)))
        return Rendered(whole, tuple(_gaps(left_out, len(whole))), turns=False)

    def _must_follow_something(self, index: int) -> None:
        if index == 0:
            raise SampleError(self.chat.path(0), "is an assistant turn that follows nothing", "a user turn before it")

    def check_fields(self) -> None:
        """A field that does not reach the text would silently not be learnt: refuse it."""
        messages, tools = self.chat.messages, self.chat.tools
        if tools and self._is_same(len(messages), messages, None):
            raise SampleError("tools", _IGNORED, _CUT)
        for index, message in enumerate(messages):
            for path, without in _without(message):
                if self._is_same(index + 1, [*messages[:index], without], tools):
                    raise SampleError(f"{self.chat.path(index)}.{path}", _IGNORED, _CUT)

    def _is_same(self, count: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> bool:
        """Whether the text is the same without a field; a template that cannot do without the field has read it."""
        text = self.upto(count)
        try:
            return text == self._render(messages, tools, False)
        except SampleError:
            return False


def _without(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, message without the field at it) for each field that must reach the text."""
    for key in _CARRIED:
        if message.get(key):
            yield key, {name: value for name, value in message.items() if name != key}
    if message.get("name") and message["role"] != "tool":
        yield "name", {name: value for name, value in message.items() if name != "name"}
    calls = message.get("tool_calls", [])
    for index, call in enumerate(calls):
        if call["function"]["arguments"]:
            bare = {**call, "function": {**call["function"], "arguments": {}}}
            yield (
                f"tool_calls[{index}].function.arguments",
                {**message, "tool_calls": [*calls[:index], bare, *calls[index + 1 :]]},
            )


def _shared(one: str, other: str) -> int:
    """Length of the beginning that both have, up to where a marker or word ends: <b> and <think> share no mark."""
    shorter = min(len(one), len(other))
    length = next((index for index in range(shorter) if one[index] != other[index]), shorter)
    while length and not (one[length - 1].isspace() or one[length - 1] in ">]"):
        length -= 1
    return length


def _gaps(left_out: list[Span], length: int) -> Iterator[Span]:
    """What `left_out` (in order) leaves of 0 … length."""
    start = 0
    for first, last in left_out:
        if first > start:
            yield start, first
        start = last
    if start < length:
        yield start, length
