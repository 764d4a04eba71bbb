"""Tools and calls: as an engine gives them to a template, and nothing of a call lost on the way to the text."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tests.trainer.templates import CHATS, NAMES, TOOLS, refusal, templated

from tuneward_trainer.data import calls, formats
from tuneward_trainer.data.encode import Encoder
from tuneward_trainer.data.files import parse
from tuneward_trainer.data.messages import tools_of
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.templates import Held, chat_template


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("", {}),
        ('{"a": 1, "b": [1.50, -2e3, {"c": null}]}', {"a": 1, "b": [1.5, -2000.0, {"c": None}]}),
        ('{"digits": 0.10000000000000001, "exact": 0.1250000000000000000000}', {"digits": 0.1, "exact": 0.125}),
        ('{"big": 123456789012345678901234567890}', {"big": 123456789012345678901234567890}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_are_an_object(value: Any, expected: dict[str, Any]) -> None:
    assert calls.arguments_of(value, "arguments") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{", "arguments is no JSON ("),
        ("[1]", "arguments is [1]; allowed: an object, or its JSON text"),
        ('"text"', 'arguments is "text"; allowed: an object, or its JSON text'),
        (3, "arguments is 3; allowed: an object, or its JSON text"),
        ('{"a": [{"b": 1, "b": 2}]}', 'arguments.a[0] has the key "b" twice in one object; allowed: each key once'),
        ('{"a": 1, "a": 2}', 'arguments has the key "a" twice in one object; allowed: each key once'),
        ('{"a": NaN}', "arguments holds NaN, which is no JSON; allowed: "),
        ('{"a": 1e999}', "arguments holds 1e999, which would be rendered as inf; allowed: numbers that a double can hold"),
        (
            '{"a": 3.14159265358979323846}',
            "arguments holds 3.14159265358979323846, which would be rendered as 3.14159265358979",
        ),
        (
            {"a": {"b": [float("inf")]}},
            "arguments.a.b[0] is inf, which is no JSON; allowed: a number that a double can hold",
        ),
    ],
)
def test_arguments_that_lose_something_are_refused(value: Any, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        calls.arguments_of(value, "arguments")
    assert str(caught.value).startswith(expected)


def test_a_key_that_stands_twice_in_a_line_is_refused() -> None:
    with pytest.raises(SampleError) as caught:
        parse(b'{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}')
    assert str(caught.value) == 'messages[0] has the key "role" twice in one object; allowed: each key once'


PARAMETERS = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([], None),
        ("[]", None),
        (
            [{"function": {"parameters": PARAMETERS, "name": "f"}, "type": "function"}],
            [{"type": "function", "function": {"name": "f", "description": None, "parameters": PARAMETERS}}],
        ),
        (
            json.dumps([{"name": "f", "strict": True, "description": "d"}]),
            [{"type": "function", "function": {"name": "f", "description": "d", "parameters": None, "strict": True}}],
        ),
    ],
)
def test_tools_are_as_an_engine_gives_them(value: Any, expected: Any) -> None:
    found = tools_of(value)
    # The order of keys is part of what a template renders.
    assert json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([3], 'tools[0] is 3; allowed: {"type": "function", "function": {"name": …'),
        ([{"type": "function"}], 'tools[0] is {"type": "function"}; allowed: '),
        ([TOOLS[0], {"function": {"name": ""}}], 'tools[1] is {"function": {"name": ""}}; allowed: '),
        (
            [{"name": "f", "parameters": []}, {"name": "g", "parameters": [1]}],
            "tools[1].function.parameters is [1]; allowed: a JSON",
        ),
        ([{"name": "f", "description": 3}], "tools[0].function.description is 3; allowed: a text"),
        ("{", "tools is no JSON"),
        ({"name": "f"}, 'tools is {"name": "f"}; allowed: a list of tools, or its JSON text'),
    ],
)
def test_bad_tools_are_named(value: Any, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        tools_of(value)
    assert str(caught.value).startswith(expected)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": "x \\"y\\"", "b": [1.5, true]}}', []),
        ("<function=f><parameter=a>\nx &quot;y&quot;\n</parameter><parameter=b>[1.5, True]</parameter>", []),
        ("f(a='x \"y\"', b=[1.5, True])", []),
        ('g {"a": "x \\"y\\"", "b": [1.5, true]}', ["[0].function.name"]),
        ('f {"a": "x \\"y\\"", "b": [1, true]}', ["[0].function.arguments.b[0]"]),
        ('f {"a": "x", "b": [1.5]}', ["[0].function.arguments.a", "[0].function.arguments.b[1]"]),
        ("f", ["[0].function.arguments"]),
    ],
    ids=["json", "xml", "python", "name", "number", "several", "all"],
)
def test_what_of_a_call_is_not_in_the_text(text: str, expected: list[str]) -> None:
    assert list(calls.dropped([call("f", a='x "y"', b=[1.5, True])], text)) == expected


DROPS_NUMBERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v if v is string else '' }} {% endfor %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(*made: dict[str, Any]) -> formats.Sample:
    messages = [{"role": "user", "content": "Turn 1 of 2"}, {"role": "assistant", "content": None, "tool_calls": list(made)}]
    return formats.read({"messages": copy.deepcopy(messages)}, "Messages")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([call("turn", count=12345)], "messages[1].tool_calls[0].function.arguments does not reach the text"),
        (
            [call("turn", by="hand", count=12345)],
            "messages[1].tool_calls[0].function.arguments.count does not reach the text",
        ),
        # A short value may be there by chance: another one in its place is not.
        (
            [call("im_start", by="hand", end_1="x", count=1)],
            "messages[1].tool_calls[0].function.arguments.count does not reach",
        ),
        ([call("turn", by="hand"), call("turn", flag=False)], "messages[1].tool_calls[1].function.arguments does not reach"),
    ],
)
def test_an_argument_that_the_template_drops_is_named(plain: Any, made: list[dict[str, Any]], expected: str) -> None:
    own = copy.copy(plain)
    own.chat_template = DROPS_NUMBERS
    (found,) = Encoder(own, "Assistant").encode([conversation(*made)])
    assert isinstance(found, SampleError)
    assert str(found).startswith(expected)


RICH: dict[str, Any] = {
    "city": 'Orléans "vieux" <centre> & l\'église',
    "days": 3,
    "limits": {"low": -1.5, "tags": ["a b", "c\nd"], "exact": True},
    "unit": None,
}
LOSE: dict[str, str] = {}
"""Templates that render a plain call whole and drop something of this one."""


def renders_calls(name: str) -> bool:
    return refusal(name, "tools") is None


def rich() -> dict[str, Any]:
    value = copy.deepcopy(CHATS["tools"])
    value["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(RICH, ensure_ascii=False)
    return value


def test_rich_arguments_reach_the_text_of_every_template_that_renders_calls(plain: Any) -> None:
    refused = {}
    for name in filter(renders_calls, NAMES):
        (found,) = Encoder(templated(plain, name), "Assistant").encode([formats.read(rich(), "Messages")])
        if isinstance(found, SampleError):
            refused[name] = str(found)
    assert refused == LOSE


def test_arguments_reach_a_template_as_an_object_and_the_result_as_its_text(plain: Any) -> None:
    own = copy.copy(plain)
    own.chat_template = (
        "{{ messages[1].tool_calls[0].function.arguments is mapping }} {{ messages | tojson }} {{ tools | tojson }}"
    )
    sample = formats.read(rich(), "Messages")
    assert isinstance(sample, formats.Chat)
    render = chat_template(Held(own))
    assert render is not None
    given = sample.messages[1]["tool_calls"][0]["function"]
    assert given == {"name": "weather", "arguments": RICH}
    assert render(sample.messages, sample.tools, False).startswith('True [{"role": "user", ')
    assert sample.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "call12345", "name": "weather"}
    assert sample.tools == TOOLS
