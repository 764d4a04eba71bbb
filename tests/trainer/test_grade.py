"""Whether an answer counts."""

from __future__ import annotations

import pytest

from tuneward_api.evaluation import Grader
from tuneward_trainer import grade

PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zurich", "days": 2}}\n</tool_call>'
MISTRAL = '[TOOL_CALLS][{"name": "weather", "arguments": {"days": 2, "city": "Zurich"}}]'
OPENAI = '{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Zurich\\", \\"days\\": 2}"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Zurich", "days": 2}}'


@pytest.mark.parametrize(
    ("grader", "answer", "expected", "right"),
    [
        ("Exact", " 43 hours\n", "43 hours", True),
        ("Exact", "43 Hours", "43 hours", False),
        ("Contains", "It shines for\n43   HOURS on one charge.", "43 hours", True),
        ("Contains", "It shines for 4 hours.", "43 hours", False),
        ("JSONSchema", '{"name": "Ada"}', "", True),
        ("JSONSchema", '```json\n{"name": "Ada"}\n```', "", True),
        ("JSONSchema", '{"name": 3}', "", False),
        ("JSONSchema", 'Here it is: {"name": "Ada"}', "", False),
        ("JSONSchema", "", "", False),
        ("ToolCall", QWEN, QWEN, True),
        ("ToolCall", MISTRAL, QWEN, True),
        ("ToolCall", LLAMA, QWEN, True),
        ("ToolCall", OPENAI, QWEN, True),
        ("ToolCall", QWEN.replace("2", "3"), QWEN, False),
        ("ToolCall", QWEN + QWEN, QWEN, False),
        ("ToolCall", "It is sunny in Zurich.", QWEN, False),
        ("ToolCall", QWEN, "Which city?", False),
        ("ToolCall", "Which  city?", "Which city?", True),
        ("ToolCall", '{"name": "weather", "arguments": {"city": ', QWEN, False),
    ],
)
def test_an_answer_counts(grader: Grader, answer: str, expected: str, right: bool) -> None:
    assert grade.accepts(grader, answer, expected, PERSON) is right


def test_calls_of_one_turn_have_no_order() -> None:
    first, second = '{"name": "a", "arguments": {}}', '{"name": "b", "arguments": {"x": [1]}}'
    assert grade.tool_calls(f"[{first}, {second}]") == grade.tool_calls(f"{second} and {first}") == [
        ("a", "{}"),
        ("b", '{"x": [1]}'),
    ]  # fmt: skip


def test_a_schema_that_is_none_says_where() -> None:
    assert grade.schema_of('{"type": "object"}') == {"type": "object"}
    with pytest.raises(ValueError, match=r"\$\.properties\.name\.type: 'text' is not"):
        grade.schema_of('{"properties": {"name": {"type": "text"}}}')
