"""The chat templates that TRL ships, conversations to try them on, and why some cannot be rendered."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import trl

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
MARKS = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|<(?:start_of_turn|end_of_turn|end_of_utterance)>|</s>"
    r"|<\|(?:turn|channel|tool_call|tool_response|tool)>|<(?:turn|channel|tool_call|tool_response|tool)\|>"
)
"""Special tokens of the models, which the test's tokenizer gets."""
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
"""Templates that render a list of parts and nothing of a text."""

CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "city"}},
                "required": ["city"],
            },
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Hi there"), assistant("Hello!"), user("And you?"), assistant("Fine.\n\n2 + 2 = 4")]},
    "system": {"messages": [{"role": "system", "content": "Be short."}, user("Hi there"), assistant("Hello!")]},
    "thought": {
        "messages": [
            user("Hi there"),
            assistant("Hello!", reasoning_content="They greet."),
            user("And you?"),
            assistant("Fine.", reasoning_content="They ask."),
        ]
    },
    "tools": {
        "messages": [
            user("Weather in Paris?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": "sunny", "tool_call_id": "call12345", "name": "weather"},
            assistant("It is sunny."),
        ],
        "tools": TOOLS,
    },
}

IGNORED = "does not reach the text"
ALTERNATE = "messages is refused by the model's chat template (Conversation roles must alternate"
THINKS = "cannot be learnt: it is asked for behind"
NEMOTRON = ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
NO_THOUGHTS = (
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3"),
    *("gemma4_v4", "idefics3", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next", "phi3", "phi3_5"),
    *("qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
)
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {THINKS: ("deepseek_r1_distill", "deepseekv3", *NEMOTRON)},
    "system": {
        THINKS: ("deepseek_r1_distill", "deepseekv3", *NEMOTRON),
        "messages is refused by the model's chat template (System role not supported)": ("gemma",),
    },
    "thought": {
        f"messages[1].reasoning_content {IGNORED}": NO_THOUGHTS,
        THINKS: ("qwen3_5_nothink",),
    },
    "tools": {
        ALTERNATE: ("cohere", "cohere2", "gemma", "gemma3"),
        f"tools {IGNORED}": (
            *("deepseek_r1_distill", "deepseekv3_training", "idefics3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"),
            "smolvlm",
        ),
        'messages is refused by the model\'s chat template (can only concatenate str (not "dict")': ("deepseekv3",),
        f"messages[1].tool_calls {IGNORED}": ("lfm2",),
        "messages is refused by the model's chat template (Only user and assistant roles": ("llava_next",),
        THINKS: NEMOTRON,
    },
}
"""Why each template cannot render a chat; what is not here must be rendered. A training variant is as its original."""


def refusal(name: str, chat: str) -> str | None:
    for wanted in (name, name.removesuffix("_training")):
        for reason, names in REFUSED[chat].items():
            if wanted in names:
                return reason
    return None


def templated(plain: Any, name: str) -> Any:
    own = copy.copy(plain)
    own.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return own
