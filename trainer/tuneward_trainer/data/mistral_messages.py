"""A conversation as mistral-common takes it: OpenAI's messages, with ids of calls that it accepts."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from tuneward_trainer.data.formats import Chat
from tuneward_trainer.data.problems import SampleError, show

Message: TypeAlias = dict[str, Any]
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
"""Of a call, in the versions that encode it (3 to 11)."""
_ALPHABET: Final = string.ascii_letters + string.digits
_NOT_ENCODED: Final = "does not reach the tokens: mistral-common encodes none"


def messages_of(chat: Chat) -> list[Message]:
    """Raises SampleError for a field that would not be encoded."""
    messages = [_message(message, chat.path(index)) for index, message in enumerate(chat.messages)]
    if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        return _with_ids(messages, chat)
    return messages


def _message(message: Mapping[str, Any], path: str) -> Message:
    if message.get("name") and message["role"] != "tool":
        raise SampleError(f"{path}.name", _NOT_ENCODED, "leave it out")
    thoughts = {key: message[key] for key in _THOUGHTS if message.get(key)}
    kept = {key: value for key, value in message.items() if key not in _THOUGHTS}
    if not thoughts:
        return kept
    first, *others = thoughts
    if message["role"] != "assistant":
        raise SampleError(f"{path}.{first}", f"{_NOT_ENCODED} of a turn of {message['role']}", "thoughts of assistant turns")
    for other in others:
        if thoughts[other] != thoughts[first]:
            raise SampleError(f"{path}.{other}", f"is another thought than {first}: {show(thoughts[other])}", "one of them")
    return {**kept, "reasoning_content": thoughts[first]}


def _with_ids(messages: list[Message], chat: Chat) -> list[Message]:
    """Ids that mistral-common refuses are replaced, in a call and in its answer alike; answers without one belong to the
    calls in their order. The new ids differ from sample to sample, as an engine's do, and are the same in every run."""
    own: dict[Any, str] = {}
    waiting: list[str] = []
    found = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            given = message.get("tool_call_id") or (waiting[0] if waiting else None)
            if given is None:
                raise SampleError(
                    f"{chat.path(index)}.tool_call_id", "is missing, and no call waits for an answer", "its call's id"
                )
            mine = own.get(given, given)
            waiting = [one for one in waiting if one != mine]
            found.append({**message, "tool_call_id": mine})
            continue
        calls = []
        for place, call in enumerate(message.get("tool_calls", ())):
            given = call.get("id")
            mine = given if isinstance(given, str) and _ID.fullmatch(given) else _made(messages[: index + 1], place)
            if given is not None:
                own[given] = mine
            waiting.append(mine)
            calls.append({**call, "id": mine})
        found.append({**message, "tool_calls": calls} if calls else message)
    return found


def _made(upto: list[Message], place: int) -> str:
    """From what stands before the call, and the call: both answers of a pair have the same prompt."""
    seed = json.dumps([upto, place], sort_keys=True, default=str)
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in hashlib.sha256(seed.encode()).digest()[:9])
