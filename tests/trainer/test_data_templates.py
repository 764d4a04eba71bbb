"""The chat templates of real models, as TRL ships them: each is rendered as the model will be asked, or refused.

The oracle knows nothing of spans: an engine encodes the prompt alone, and what is learnt must stand right behind it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.trainer.templates import CHATS, IGNORED, NAMES, PARTS_ONLY, REFUSED, assistant, refusal, templated, user

from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.problems import SampleError


def ask(tokenizer: Any, name: str, chat: formats.Chat, count: int, **options: Any) -> Any:
    """The template's own rendering of the first `count` messages."""
    messages = chat.messages[:count]
    if name.startswith(PARTS_ONLY):
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    return tokenizer.apply_chat_template(messages, tools=chat.tools, **options)


def sample(name: str) -> formats.Chat:
    read = formats.read(copy.deepcopy(CHATS[name]), "Messages")
    assert isinstance(read, formats.Chat)
    return read


def learnt(documents: list[Encoded]) -> Iterator[tuple[list[int], list[int]]]:
    """(what stands before it, what is learnt) for each run of weights."""
    for document in documents:
        weights = [*document.weights.tolist(), 0.0]
        edges = [index for index in range(1, len(weights)) if weights[index] != weights[index - 1]]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            yield document.ids[:start].tolist(), document.ids[start:end].tolist()


@pytest.fixture(scope="module")
def encoder(plain: Any) -> Callable[[str], tuple[Any, Encoder]]:
    """(tokenizer, its encoder) of a template; the last one is kept for the next conversation."""

    @functools.lru_cache(maxsize=1)
    def made(name: str) -> tuple[Any, Encoder]:
        tokenizer = templated(plain, name)
        return tokenizer, Encoder(tokenizer, "Assistant")

    return made


@pytest.mark.parametrize("chat_name", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_stands_behind_the_prompt_that_asks_for_it(
    encoder: Callable[[str], tuple[Any, Encoder]], name: str, chat_name: str
) -> None:
    (tokenizer, own), chat = encoder(name), sample(chat_name)
    (found,) = own.encode([chat])
    if reason := refusal(name, chat_name):
        assert isinstance(found, SampleError)
        assert reason in str(found)
        return
    assert not isinstance(found, SampleError), found
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    for turn, (before, said) in zip(turns, learnt(found), strict=True):
        prompt = ask(tokenizer, name, chat, turn, add_generation_prompt=True, tokenize=False)
        assert before == tokenizer.encode(prompt, add_special_tokens=False)
        answer = ask(tokenizer, name, chat, turn + 1, tokenize=False).removeprefix(prompt)
        text = tokenizer.decode(said)
        # Behind the end of the turn the template may put space; where it ends none, ours is eos.
        assert answer.rstrip() in (text, text.removesuffix(tokenizer.eos_token))
        assert tokenizer.added_tokens_decoder[said[-1]].special


def test_every_template_of_trl_is_tried() -> None:
    assert len([name for name in NAMES if not name.endswith("_training")]) >= 41
    assert {name for reasons in REFUSED.values() for names in reasons.values() for name in names} <= set(NAMES)


def test_a_thought_that_the_prompt_opens_is_learnt_from_the_content(plain: Any) -> None:
    """DeepSeek R1's template opens the thought and drops it from every recorded answer."""
    tokenizer = templated(plain, "deepseek_r1_distill")
    content = "<think>\nThey greet.\n</think>\n\nHello!"
    chat = formats.Chat([user("Hi"), assistant(content), user("And you?"), assistant(content)], [0, 1, 0, 1])
    (found,) = Encoder(tokenizer, "Assistant").encode([chat])
    assert not isinstance(found, SampleError), found
    for turn, (before, said) in zip((1, 3), learnt(found), strict=True):
        prompt = ask(tokenizer, "deepseek_r1_distill", chat, turn, add_generation_prompt=True, tokenize=False)
        assert prompt.endswith("<think>\n")
        assert before == tokenizer.encode(prompt, add_special_tokens=False)
        assert tokenizer.decode(said) == "They greet.\n</think>\n\nHello!<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize(("stops", "end"), [("<|end|>", "<|end|>"), (None, "<|end|>\n<|im_end|>")])
def test_a_turn_ends_where_generation_does(plain: Any, stops: str | None, end: str) -> None:
    """Phi-3 ends a turn with <|end|> and the last one with eos too: what stands behind the first is never generated."""
    tokenizer = templated(plain, "phi3")
    ids = [tokenizer.convert_tokens_to_ids(stops)] if stops else []
    (found,) = Encoder(tokenizer, "Assistant", ids).encode([sample("plain")])
    assert not isinstance(found, SampleError), found
    assert [tokenizer.decode(said) for _, said in learnt(found)] == [f"Hello!{end}", f"Fine.\n\n2 + 2 = 4{end}"]


def test_a_name_of_a_call_that_does_not_reach_the_text_is_named(plain: Any) -> None:
    own = copy.copy(plain)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}"
        "{% endfor %}{% endfor %}"
    )
    chat = formats.read({"messages": copy.deepcopy(CHATS["tools"]["messages"])}, "Messages")
    (found,) = Encoder(own, "Assistant").encode([chat])
    assert isinstance(found, SampleError)
    assert str(found).startswith(f"messages[1].tool_calls[0].function.name {IGNORED}")


def test_content_that_the_template_drops_is_named(plain: Any) -> None:
    own = copy.copy(plain)
    own.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content.split('#')[-1] }}{% endfor %}"
    encode = Encoder(own, "Assistant").encode
    (dropped, partly) = encode(
        [
            formats.Chat([{"role": "system", "content": "Be short."}, user("Hi"), assistant("Hello!")], [0, 0, 1]),
            formats.Chat([user("Hi"), assistant("a#b")], [0, 1]),
        ]
    )
    assert str(dropped).startswith(f"messages[0].content {IGNORED}")
    assert str(partly).startswith("messages[1].content reaches the text only in part")
