"""Which tokens are learnt: against a naive oracle, on SmolLM2's template and on templates that do tricky things."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tuneward_trainer.data import formats
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.render import LossOn

APPENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_REASONING = (  # as Qwen3: reasoning of the last turn only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THINK = (  # as DeepSeek R1: the prompt holds more than a recorded answer does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TRAILING_SPACE = (  # as Alpaca's: the prompt's last space sticks to the answer's first word
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_STOP = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ALTERNATES = (  # as Mistral's
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def templated(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with another template; "" is none, None its own."""
    if template is None:
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = template or None
    return own


def encoder(tokenizer: Any, template: str | None = None, loss_on: LossOn = "Assistant") -> Encoder:
    return Encoder(templated(tokenizer, template), loss_on)


def read(value: dict[str, Any]) -> formats.Sample:
    return formats.read(value, formats.detect(value))


def chat(*turns: str, **fields: Any) -> formats.Sample:
    """Turns as "role: content", "-assistant: …" for weight 0."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, content = turn.split(": ", 1)
        weight = {"weight": 0} if role.startswith("-") else {}
        messages.append({"role": role.lstrip("-"), "content": content, **weight})
    return read({"messages": messages, **fields})


def one(found: list[list[Encoded] | SampleError]) -> list[Encoded]:
    assert not isinstance(found[0], SampleError), found[0]
    return found[0]


def show(tokenizer: Any, document: Encoded) -> list[tuple[bool, str]]:
    """Runs of (learnt, text)."""
    runs: list[tuple[bool, list[int]]] = []
    for number, weight in zip(document.ids.tolist(), document.weights.tolist(), strict=True):
        if not runs or runs[-1][0] != bool(weight):
            runs.append((bool(weight), []))
        runs[-1][1].append(number)
    return [(learnt, tokenizer.decode(ids)) for learnt, ids in runs]


SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def test_every_assistant_turn_is_learnt_with_its_stop_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    documents = one(encoder(tokenizer).encode([chat("user: Hi", "assistant: Hello!", "user: Bye", "assistant: See you")]))
    assert [show(tokenizer, document) for document in documents] == [
        [
            (False, f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
            (True, "Hello!<|im_end|>"),
            (False, "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
            (True, "See you<|im_end|>"),
        ]
    ]


@pytest.mark.parametrize(
    ("template", "loss_on", "turns", "expected"),
    [
        pytest.param(
            APPENDS,
            "Assistant",
            ["user: a", "-assistant: b", "user: c", "assistant: d", "user: e"],
            [
                [
                    (False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                     "<|im_start|>assistant\n"),
                    (True, "d<|im_end|>"),
                ]
            ],
            id="weight 0 gets no loss, and nothing after the last learnt turn is kept",
        ),
        pytest.param(
            APPENDS,
            "LastAssistant",
            ["user: a", "assistant: b", "user: c", "assistant: d"],
            [
                [
                    (False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                     "<|im_start|>assistant\n"),
                    (True, "d<|im_end|>"),
                ]
            ],
            id="only the last turn",
        ),
        pytest.param(
            APPENDS,
            "All",
            ["user: a", "-assistant: b", "user: c"],
            [
                [
                    (False, "<|im_start|>"),
                    (True, "user\na<|im_end|>\n<|im_start|>assistant\n"),
                    (False, "b<|im_end|>\n"),
                    (True, "<|im_start|>user\nc<|im_end|>\n"),
                ]
            ],
            id="all but the weight 0 turn",
        ),
        pytest.param(
            OPENS_THINK,
            "Assistant",
            ["user: a", "assistant: <think>\nr</think>b"],
            [[(False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n"), (True, "r</think>b<|im_end|>")]],
            id="a generation prompt that opens the answer",
        ),
        pytest.param(
            TRAILING_SPACE,
            "Assistant",
            ["user: a", "assistant: Paris", "user: b", "assistant: Rome"],
            [
                [(False, "user: a\nassistant: "), (True, "Paris<|im_end|>")],
                [(False, "user: a\nassistant: Paris<|im_end|>\nuser: b\nassistant: "), (True, "Rome<|im_end|>")],
            ],
            id="a token across the prompt's end: each turn apart, encoded as at inference",
        ),
        pytest.param(
            NO_STOP,
            "Assistant",
            ["user: a", "assistant: b", "user: c", "assistant: d"],
            [
                [(False, "[user]a[assistant]"), (True, "b<|im_end|>")],
                [(False, "[user]a[assistant]b[user]c[assistant]"), (True, "d<|im_end|>")],
            ],
            id="a template without stop tokens: each turn apart, ended by eos",
        ),
    ],
)  # fmt: skip
def test_templates(tokenizer: Any, template: str, loss_on: LossOn, turns: list[str], expected: Any) -> None:
    documents = one(encoder(tokenizer, template, loss_on).encode([chat(*turns)]))
    assert [show(tokenizer, document) for document in documents] == expected


def test_a_template_that_drops_earlier_reasoning_gives_one_sample_a_turn(tokenizer: Any) -> None:
    sample = read(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "r1"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d", "reasoning_content": "r2"},
            ]
        }
    )
    documents = one(encoder(tokenizer, STRIPS_REASONING).encode([sample]))
    first = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [show(tokenizer, document) for document in documents] == [
        [(False, first), (True, "<think>r1</think>\nb<|im_end|>")],
        [
            (False, first + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"),
            (True, "<think>r2</think>\nd<|im_end|>"),
        ],
    ]


@pytest.mark.parametrize("content", ["<|im_end|> I am", "I <|endoftext|>am"])
def test_an_answer_that_holds_what_ends_it_is_refused(tokenizer: Any, content: str) -> None:
    asked = {"role": "user", "content": "Who <|im_end|> are you?"}
    answers = {"role": "assistant", "content": content}, {"role": "assistant", "content": "Fine."}
    bad, good = ({"messages": [asked, one, asked, answers[1]]} for one in answers)
    ends = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    found = Encoder(tokenizer, "Assistant", [ends]).encode([formats.read(one, "Messages") for one in (bad, good)])
    assert isinstance(found[0], SampleError) and not isinstance(found[1], SampleError)
    token = "<|endoftext|>" if "endoftext" in content else "<|im_end|>"
    assert str(found[0]).startswith(f" has {token} within an answer, at which generation ends")


def test_texts_and_completions_end_in_eos(tokenizer: Any) -> None:
    samples = [read({"text": "To be"}), read({"prompt": "2+2= ", "completion": "4"})]
    plain = encoder(tokenizer, "")
    assert [[show(tokenizer, document) for document in one([found])] for found in plain.encode(samples)] == [
        [[(False, "To"), (True, " be<|im_end|>")]],
        [[(False, "2+2= "), (True, "4<|im_end|>")]],
    ]
    assert [show(tokenizer, document) for document in one(encoder(tokenizer, APPENDS).encode(samples[1:]))] == [
        [(False, "<|im_start|>user\n2+2= <|im_end|>\n<|im_start|>assistant\n"), (True, "4<|im_end|>")]
    ]


def test_bos_is_not_doubled(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template = None
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    documents = Encoder(own, "Assistant").encode([read({"text": "To be"}), read({"text": "<|im_start|>To be"})])
    assert one(documents[:1]) == one(documents[1:]) == [Encoded.of([1, 2068, 325, 2], [0.0, 1.0, 1.0, 1.0])]


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        (None, chat("user: a", "assistant: b", tools=TOOLS), "tools does not reach the text"),
        (
            None,
            read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}),
            "messages[1].tool_calls does not reach the text",
        ),
        (
            None,
            read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]}),
            "messages[1].reasoning_content does not reach the text",
        ),
        (
            "{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{% endfor %}{% endfor %}",
            read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}),
            "messages[1].tool_calls[0].function.arguments does not reach the text",
        ),
        (None, chat("user: a"), "messages has no assistant turn"),
        (None, chat("user: a", "-assistant: b"), "messages has nothing to learn: every assistant turn has weight 0"),
        (None, chat("assistant: b", "user: a"), "messages[0] is an assistant turn that follows nothing"),
        (
            OPENS_THINK,
            chat("user: a", "assistant: b"),
            'messages[1] cannot be learnt: it is asked for behind "<|im_start|>assistant\\n<think>\\n", which the rendered',
        ),
        (ALTERNATES, chat("user: a", "user: b", "assistant: c"), "roles must alternate user/assistant/user/assistant"),
        ("", chat("user: a", "assistant: b"), "messages needs a chat template, and the model has none"),
    ],
)  # fmt: skip
def test_what_the_template_cannot_render_is_refused(tokenizer: Any, template: str | None, value: Any, expected: str) -> None:
    (found,) = encoder(tokenizer, template).encode([value])
    assert isinstance(found, SampleError)
    assert expected in str(found)


def oracle(tokenizer: Any, messages: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """One (prompt ids, answer ids) for each turn, each encoded as an engine would, from the template alone."""
    pairs = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
            said = message["content"].removeprefix("<think>\n")
            answer = tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)
            pairs.append((tokenizer.encode(prompt, add_special_tokens=False), answer))
    return pairs


@pytest.mark.parametrize("template", [None, APPENDS, STRIPS_REASONING, OPENS_THINK])
def test_masks_against_naive_rendering_of_each_prefix(tokenizer: Any, template: str | None) -> None:
    dice = random.Random(str(template))
    words = ["né", "  two spaces", "\nline", "日本", "🙂🙂", "12 34", "", "<b>", "don't", " ", "\u2028", "x" * 30, "e\u0301"]
    own = encoder(tokenizer, template)
    opened = "<think>\n" if template == OPENS_THINK else ""
    for _ in range(60):
        turns = [
            f"user: {dice.choice(words)}{dice.choice(words)}",
            f"assistant: {opened}{dice.choice(words)}w{dice.choice(words)}",
        ]
        turns = ["system: s"] * dice.randint(0, 1) + turns * dice.randint(1, 3)
        sample = chat(*turns)
        assert isinstance(sample, formats.Chat)
        spans = [
            (document.ids[:start].tolist(), document.ids[start:end].tolist())
            for document in one(own.encode([sample]))
            for start, end in runs(document.weights.tolist())
        ]
        pairs = oracle(templated(tokenizer, template), sample.messages)
        assert spans == pairs


def runs(weights: list[float]) -> list[tuple[int, int]]:
    """(start, end) of each run of weight 1."""
    edges = [i for i in range(1, len(weights) + 1) if [*weights, 0.0][i] != weights[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
