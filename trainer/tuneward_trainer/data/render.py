"""From a sample to texts with the spans that are learnt, through the model's own chat template.

A conversation is one text where the template only ever appends: then each turn's prompt, as an engine would render it,
is a prefix of the whole. Where a template changes earlier turns (drops their reasoning, closes only the last), every
learnt turn becomes a text of its own, cut after it, so that the model sees what it will see at inference. An answer that
would not stand behind the prompt that asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from jinja2 import TemplateError

from tuneward_trainer.data.calls import dropped, marked, stands
from tuneward_trainer.data.formats import Chat, PromptCompletion, Sample, Text
from tuneward_trainer.data.problems import SampleError, show
from tuneward_trainer.data.shapes import Frame, Quick, Shapes, Span

LossOn: TypeAlias = Literal["Assistant", "LastAssistant", "All"]

_CARRIED: Final = ("reasoning_content", "reasoning", "thinking", "tool_calls")
"""Fields of a message whose text must reach the rendering. Ids of calls, and names of tools' answers, are links."""
_IGNORED: Final = "does not reach the text: the model's chat template ignores it"
_CUT: Final = "leave it out, or use a model whose chat template renders it"
_NO_TEMPLATE: Final = "prompt and completion, or text; or an instruct model, which has a chat template"


@dataclass(frozen=True)
class Rendered:
    """`spans`: the parts of `text`, in characters, that are learnt; `turns` says whether a stop token ends each.

    `parts`: places where the encoding is cut, as at inference the prompt is encoded alone. `raw`: a text without
    template, which gets the tokenizer's own first token. `frame`: what of it is the same for other texts, if that is known.
    """

    text: str
    spans: tuple[Span, ...]
    turns: bool = True
    parts: tuple[int, ...] = ()
    raw: bool = False
    frame: Frame | None = None


Template: TypeAlias = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, bool], str]


class Renderer:
    """`template(messages, tools, generation_prompt) -> text` is the model's; None: it has none. `quick(messages, prompt) ->
    text` renders plain turns in less time, and `source` is the template's own text; both are for shapes.py."""

    def __init__(
        self,
        template: Template | None,
        loss_on: LossOn,
        quick: Quick | None = None,
        source: str = "",
    ) -> None:
        self._template = template
        self._loss_on = loss_on
        self._shapes = Shapes(quick, self._prove, source) if template is not None and quick is not None else None

    def foresee(self) -> None:
        """Proves what most conversations are like, before any is seen."""
        if self._shapes is not None:
            self._shapes.foresee()

    def render(self, sample: Sample) -> list[Rendered]:
        """One or several texts. Raises SampleError."""
        if isinstance(sample, Text):
            return [Rendered(sample.text, ((0, len(sample.text)),), turns=False, raw=True)]
        if isinstance(sample, PromptCompletion):
            if self._template is None:
                return [self._completion(sample)]
            sample = as_chat(sample)
        return self._chat(sample, apart=False)

    def render_apart(self, sample: Sample) -> list[Rendered]:
        """As `render`, but every learnt turn a text of its own, its prompt encoded alone: for tokens that would
        reach across the end of a prompt."""
        if isinstance(sample, PromptCompletion):
            sample = as_chat(sample)
        assert isinstance(sample, Chat)
        return self._chat(sample, apart=True)

    def _completion(self, sample: PromptCompletion) -> Rendered:
        text = sample.prompt + sample.completion
        cut = len(sample.prompt)
        start = 0 if self._loss_on == "All" else cut
        return Rendered(text, ((start, len(text)),), turns=False, parts=(cut,) if cut else (), raw=True)

    def _chat(self, chat: Chat, *, apart: bool) -> list[Rendered]:
        if self._template is None:
            raise SampleError(chat.field, "needs a chat template, and the model has none", _NO_TEMPLATE)
        conversation = _Conversation(chat, self._template)
        if self._loss_on == "All":
            conversation.check_fields(len(chat.messages))
            return [conversation.everything()]
        learnt = learnt_turns(chat, self._loss_on)
        if not apart and (quick := self._quick(chat, learnt)):
            return [quick]
        conversation.check_fields(learnt[-1] + 1)
        if not apart and (whole := conversation.as_one(learnt)):
            return [whole]
        return [conversation.turn(index, cut=apart) for index in learnt]

    def _quick(self, chat: Chat, learnt: list[int]) -> Rendered | None:
        if self._shapes is None or chat.tools or learnt[0] == 0:
            return None
        found = self._shapes.find(chat.messages[: learnt[-1] + 1], learnt)
        if found is None:
            return None
        text, frame, spans = found
        return Rendered(text, spans, frame=frame)

    def _prove(self, messages: list[dict[str, Any]]) -> tuple[str, dict[int, Span]] | None:
        """The text and the spans of all its assistant turns, where the template only appends."""
        assert self._template is not None
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
        try:
            whole = _Conversation(Chat(messages, [1] * len(messages)), self._template).as_one(turns)
        except SampleError:
            return None
        return (whole.text, dict(zip(turns, whole.spans, strict=True))) if whole else None


def learnt_turns(chat: Chat, loss_on: LossOn) -> list[int]:
    """Turns with a loss. Raises SampleError where there is none."""
    assistant = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not assistant:
        raise SampleError(chat.field, "has no assistant turn, so nothing to learn", "at least one assistant turn")
    chosen = [i for i in (assistant[-1:] if loss_on == "LastAssistant" else assistant) if chat.weights[i]]
    if not chosen:
        which = "the last assistant turn" if loss_on == "LastAssistant" else "every assistant turn"
        raise SampleError(chat.field, f"has nothing to learn: {which} has weight 0", "at least one turn of weight 1")
    return chosen


def as_chat(sample: PromptCompletion) -> Chat:
    """With a chat template, a prompt is what a user says: so it is asked when the model is served."""
    return Chat(
        [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}],
        [0, 1],
        field=sample.field,
        paths=("prompt", sample.field),
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
                self.chat.field, f"is refused by the model's chat template ({error})", "the turns that this template renders"
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
            self._must_hold(index, before, after)
            spans.append((len(before), len(after)))
        return Rendered(whole, tuple(spans))

    def turn(self, index: int, *, cut: bool) -> Rendered:
        """The conversation up to turn `index`, which alone is learnt."""
        self._must_follow_something(index)
        text, before = self.upto(index + 1), self.upto(index, prompt=True)
        if not text.startswith(before):
            text = self._continued(index, text, before)
        else:
            self._must_hold(index, before, text)
        return Rendered(text, ((len(before), len(text)),), parts=(len(before),) if cut else ())

    def _continued(self, index: int, text: str, before: str) -> str:
        """What the template drops from answers (DeepSeek R1's thoughts) is learnt where the content goes on from what the
        prompt opens: then the content stands behind the prompt as the model must say it, and what ends it is kept."""
        content: str = self.chat.messages[index]["content"].strip()
        opened = _opened(before)
        last = content.rpartition("\n")[2]
        end = text.rfind(last) + len(last)
        if not opened.strip() or not content.startswith(opened.strip()) or end < len(self.upto(index)):
            raise self._asked_otherwise(index, text, before)
        said = content.removeprefix(opened.strip())
        return before + (said.lstrip() if opened[-1].isspace() else said) + text[end:]

    def _asked_otherwise(self, index: int, text: str, before: str) -> SampleError:
        """The model would be trained behind another prompt than it is asked with."""
        history = self.upto(index)
        if text.startswith(history) and before.startswith(history):
            asked = show(before[len(history) :])
            seen = f"cannot be learnt: it is asked for behind {asked}, which the rendered answer does not begin with"
        else:
            seen = "cannot be learnt: the chat template renders what stands before it differently once it is answered"
        return SampleError(
            self.chat.path(index),
            seen,
            "answers that begin as they are asked for: with reasoning_content, or with the thought in the content",
        )

    def _must_hold(self, index: int, before: str, text: str) -> None:
        """The turn's content is all in what is learnt, but for what the prompt opens; templates trim it, and some put
        thoughts on lines of their own."""
        content, answer = _bare(self.chat.messages[index]["content"]), _bare(text[len(before) :])
        if content not in answer and content.removeprefix(_bare(_opened(before))) not in answer:
            raise SampleError(f"{self.chat.path(index)}.content", "reaches the text only in part", _CUT)

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

    def check_fields(self, count: int) -> None:
        """A field that does not reach the text of the first `count` messages would silently not be learnt: refuse it."""
        messages, tools = self.chat.messages[:count], self.chat.tools
        whole = self.upto(count)
        if tools and self._is_same(count, messages, None):
            raise SampleError("tools", _IGNORED, _CUT)
        for index, tool in enumerate(tools or ()):
            if not stands(tool["function"]["name"], whole):
                raise SampleError(f"tools[{index}].function.name", _IGNORED, _CUT)
        for index, message in enumerate(messages):
            for path, without in _without(message, whole):
                if self._is_same(index + 1, [*messages[:index], without], tools):
                    raise SampleError(f"{self.chat.path(index)}.{path}", _IGNORED, _CUT)
            if message.get("tool_calls"):
                self._check_calls(index)

    def _check_calls(self, index: int) -> None:
        """The name and every argument stand in the turn's own text; and other values would stand there too, as a short
        one may be there by chance."""
        message, place = self.chat.messages[index], f"{self.chat.path(index)}.tool_calls"
        if lost := list(dropped(message["tool_calls"], self._own(index))):
            raise SampleError.of([SampleError(place + path, _IGNORED, _CUT) for path in lost])
        marks = marked(message["tool_calls"])
        try:
            text = self._render([*self.chat.messages[:index], {**message, "tool_calls": marks}], self.chat.tools, False)
        except SampleError:
            return  # a template that minds the values has read them
        if lost := list(dropped(marks, text)):
            raise SampleError.of([SampleError(place + path, _IGNORED, _CUT) for path in lost])

    def _own(self, index: int) -> str:
        """What a message adds to the text; all of it where that cannot be told."""
        text = self.upto(index + 1)
        try:
            before = self.upto(index) if index else ""
        except SampleError:
            return text
        return text.removeprefix(before)

    def _is_same(self, count: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> bool:
        """Whether the text is the same without a field; a template that cannot do without the field has read it."""
        text = self.upto(count)
        try:
            return text == self._render(messages, tools, False)
        except SampleError:
            return False


def _opened(before: str) -> str:
    """The marker that a prompt ends in, such as <think>, with the space behind it; empty if it ends in none."""
    start = before.rfind("<")
    return before[start:] if start >= 0 and before.rstrip().endswith(">") else ""


def _bare(text: str) -> str:
    """Without any space."""
    return "".join(text.split())


def _without(message: dict[str, Any], whole: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, message without the field at it) for each field that must reach the text and may not."""
    if message["role"] != "assistant" and message["content"].strip() not in whole:
        yield "content", {**message, "content": ""}
    for key in _CARRIED:
        if message.get(key):
            yield key, {name: value for name, value in message.items() if name != key}
    if message.get("name") and message["role"] != "tool":
        yield "name", {name: value for name, value in message.items() if name != "name"}


def _gaps(left_out: list[Span], length: int) -> Iterator[Span]:
    """What `left_out` (in order) leaves of 0 … length."""
    start = 0
    for first, last in left_out:
        if first > start:
            yield start, first
        start = last
    if start < length:
        yield start, length
