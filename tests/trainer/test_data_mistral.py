"""Mistral's own tokenizers: ids against mistral-common's own encoding, and masks that are exactly the answers."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tests.support.mistral import MADE, SHIPPED, make_tekken

from tuneward_trainer.data import formats, mistral_frames
from tuneward_trainer.data.documents import Encoded
from tuneward_trainer.data.mistral import OwnTokenizer, UnreadableError
from tuneward_trainer.data.mistral_frames import Frames
from tuneward_trainer.data.problems import SampleError
from tuneward_trainer.data.render import LossOn

ALL = (*SHIPPED, *MADE)
WITH_TOOLS = [name for name in ALL if name != "v1"]
TOOLS = [Tool(function=Function(name="scale", description="Weighs it.", parameters={"type": "object", "properties": {}}))]
CALL = ToolCall(id="Ab3De6Gh9", function=FunctionCall(name="scale", arguments={"what": "a lámp", "n": 2}))
SECOND = ToolCall(id="zzzzzzzz9", function=FunctionCall(name="scale", arguments={"what": "oil"}))

system, user, said = SystemMessage, UserMessage, AssistantMessage
Talk = list[Any]

PLAIN: Talk = [user(content="How heavy is a lamp?"), said(content="2 kg, héavy, 👩‍🔬.")]
SYSTEM: Talk = [system(content="Be brief."), *PLAIN, user(content="And oil?"), said(content="1 kg.\n\nYes.")]
TURNS: Talk = [*PLAIN, user(content="And oil?"), said(content="1 kg"), user(content="Bye"), said(content="See you")]
CALLS: Talk = [
    *PLAIN,
    user(content="Weigh it"),
    said(tool_calls=[CALL]),
    ToolMessage(content='{"kg": 2}', tool_call_id=CALL.id, name="scale"),
    said(content="2 kg"),
    user(content="And now?"),
    said(content="Still 2 kg"),
]
TWO_CALLS: Talk = [
    user(content="Weigh both"),
    said(tool_calls=[CALL, SECOND]),
    ToolMessage(content="two", tool_call_id=CALL.id, name="scale"),
    ToolMessage(content="one", tool_call_id=SECOND.id, name="scale"),
    said(content="3 kg"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: make_tekken(folder / name / "tekken.json", name.removesuffix("-tekken")) for name in MADE}
    return SHIPPED | made


@cache
def own(file: Path) -> OwnTokenizer:
    return OwnTokenizer(file)


@cache
def common(file: Path, mode: ValidationMode) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    return MistralTokenizer.from_file(str(file), mode=mode)


def oracle(file: Path, talk: Talk, tools: list[Tool] | None) -> list[int]:
    """mistral-common's own encoding: of a prompt, or of what is trained on."""
    mode = ValidationMode.finetuning if isinstance(talk[-1], AssistantMessage) else ValidationMode.test
    found: list[int] = common(file, mode).encode_chat_completion(ChatCompletionRequest(messages=talk, tools=tools)).tokens
    return found


def line(talk: Talk, tools: list[Tool] | None = None, silent: Sequence[int] = ()) -> dict[str, Any]:
    """As people have it in a file; turns in `silent` have weight 0."""
    messages = []
    for index, message in enumerate(talk):
        one = message.model_dump(mode="json", exclude_none=True, exclude={"prefix"})
        messages.append(one | ({"weight": 0} if index in silent else {}))
    return {"messages": messages, **({"tools": [tool.model_dump(mode="json") for tool in tools]} if tools else {})}


def read(value: dict[str, Any]) -> formats.Sample:
    return formats.read(value, formats.detect(value))


def encode(file: Path, value: dict[str, Any], loss_on: LossOn = "Assistant") -> list[Encoded]:
    (found,) = own(file).encoder(loss_on).encode([read(value)])
    assert not isinstance(found, SampleError), found
    return found


def refusal(file: Path, value: dict[str, Any], loss_on: LossOn = "Assistant") -> str:
    (found,) = own(file).encoder(loss_on).encode([read(value)])
    assert isinstance(found, SampleError)
    return str(found)


def runs(document: Encoded) -> Iterator[list[int]]:
    """What is learnt without a break."""
    run: list[int] = []
    for number, weight in zip([*document.ids.tolist(), 0], [*document.weights.tolist(), 0.0], strict=True):
        if weight:
            run.append(number)
        elif run:
            yield run
            run = []


def learnt(file: Path, documents: list[Encoded]) -> list[list[str]]:
    return [[own(file).decode(run) for run in runs(document)] for document in documents]


def called(version: str, *calls: ToolCall) -> str:
    """The answer that calls, as each version writes it."""
    number = int(version.removeprefix("v").split("-")[0])
    parts = [
        (one.function.name, json.dumps(json.loads(one.function.arguments), ensure_ascii=False), one.id) for one in calls
    ]
    if number >= 11:
        ids = [f"[CALL_ID]{one}" if number == 11 else "" for _, _, one in parts]
        return "".join(f"[TOOL_CALLS]{n}{i}[ARGS]{a}" for (n, a, _), i in zip(parts, ids, strict=True)) + "</s>"
    texts = [f'{{"name": "{n}", "arguments": {a}' + (f', "id": "{i}"}}' if number > 2 else "}") for n, a, i in parts]
    return f"[TOOL_CALLS][{', '.join(texts)}]</s>"


def holds(file: Path, documents: list[Encoded], talk: Talk, tools: list[Tool] | None, turns: list[list[int]]) -> None:
    """Each document is mistral-common's encoding up to its last learnt turn; each learnt turn stands behind its prompt."""
    assert len(documents) == len(turns)
    for document, chosen in zip(documents, turns, strict=True):
        ids = document.ids.tolist()
        assert ids == oracle(file, talk[: chosen[-1] + 1], tools)
        weights = [0.0] * len(ids)
        for index in chosen:
            prompt, answered = oracle(file, talk[:index], tools), oracle(file, talk[: index + 1], tools)
            assert ids[: len(prompt)] == prompt
            assert ids[: len(answered)] == answered
            weights[len(prompt) : len(answered)] = [1.0] * (len(answered) - len(prompt))
        assert document.weights.tolist() == weights


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("talk", "silent", "loss_on", "turns", "answers"),
    [
        pytest.param(PLAIN, [], "Assistant", [1], ["2 kg, héavy, 👩‍🔬.</s>"], id="plain"),
        pytest.param(TURNS, [], "Assistant", [1, 3, 5], ["2 kg, héavy, 👩‍🔬.</s>", "1 kg</s>", "See you</s>"], id="turns"),
        pytest.param(TURNS, [1, 5], "Assistant", [3], ["1 kg</s>"], id="weight 0, and nothing behind the last learnt turn"),
        pytest.param(TURNS, [], "LastAssistant", [5], ["See you</s>"], id="the last turn"),
    ],
)
def test_a_conversation_without_system_prompt_and_tools_is_one_document(
    name: str, talk: Talk, silent: list[int], loss_on: LossOn, turns: list[int], answers: list[str], files: dict[str, Path]
) -> None:
    documents = encode(files[name], line(talk, silent=silent), loss_on)
    holds(files[name], documents, talk, None, [turns])
    assert learnt(files[name], documents) == [answers]


@pytest.mark.parametrize("name", ALL)
def test_a_system_prompt_stands_where_the_version_puts_it(name: str, files: dict[str, Path]) -> None:
    documents = encode(files[name], line(SYSTEM))
    moves = name.startswith(("v2", "v3"))
    holds(files[name], documents, SYSTEM, None, [[2], [4]] if moves else [[2, 4]])
    first, second = "2 kg, héavy, 👩‍🔬.</s>", "1 kg.\n\nYes.</s>"
    assert learnt(files[name], documents) == ([[first], [second]] if moves else [[first, second]])
    as_developer = line(SYSTEM)
    as_developer["messages"][0]["role"] = "developer"
    assert encode(files[name], as_developer) == documents


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_calls_and_their_answers(name: str, files: dict[str, Path]) -> None:
    """Up to version 11 tools stand before the last user turn, so that turn by turn other tokens are learnt from."""
    documents = encode(files[name], line(CALLS, TOOLS))
    moves = not name.startswith(("v13", "v15"))
    holds(files[name], documents, CALLS, TOOLS, [[1], [3], [5], [7]] if moves else [[1, 3, 5, 7]])
    answers = ["2 kg, héavy, 👩‍🔬.</s>", called(name, CALL), "2 kg</s>", "Still 2 kg</s>"]
    assert learnt(files[name], documents) == ([[answer] for answer in answers] if moves else [answers])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_one_question_with_calls_is_one_document(name: str, files: dict[str, Path]) -> None:
    talk = [*CALLS[2:6]]
    documents = encode(files[name], line(talk, TOOLS))
    holds(files[name], documents, talk, TOOLS, [[1, 3]])
    assert learnt(files[name], documents) == [[called(name, CALL), "2 kg</s>"]]


@pytest.mark.parametrize("name", [name for name in WITH_TOOLS if name != "v2"])
def test_two_calls_at_once(name: str, files: dict[str, Path]) -> None:
    documents = encode(files[name], line(TWO_CALLS, TOOLS))
    holds(files[name], documents, TWO_CALLS, TOOLS, [[1, 4]])
    assert learnt(files[name], documents) == [[called(name, CALL, SECOND), "3 kg</s>"]]


def test_calls_of_history_that_version_2_drops_are_learnt_where_an_engine_has_them(files: dict[str, Path]) -> None:
    talk = [*CALLS]
    documents = encode(files["v2"], line(talk))
    holds(files["v2"], documents, talk, None, [[1], [3], [5], [7]])
    assert "[TOOL_CALLS]" not in own(files["v2"]).decode(documents[-1].ids.tolist())


@pytest.mark.parametrize("name", ALL)
def test_loss_on_all(name: str, files: dict[str, Path]) -> None:
    (document,) = encode(files[name], line(TURNS, silent=[3]), "All")
    whole = oracle(files[name], TURNS, None)
    prompt, answered = oracle(files[name], TURNS[:3], None), oracle(files[name], TURNS[:4], None)
    weights = [0.0, *[1.0] * (len(whole) - 1)]
    weights[len(prompt) : len(answered)] = [0.0] * (len(answered) - len(prompt))
    assert document == Encoded.of(whole, weights)
    (asked,) = encode(files[name], line(TURNS[:3]), "All")
    assert asked.ids.tolist() == prompt
    assert "later turns change" in refusal(files["v3"], line(SYSTEM, silent=[2]), "All")


@pytest.mark.parametrize("name", ALL)
def test_a_text_is_learnt_from_its_second_token_to_the_end(name: str, files: dict[str, Path]) -> None:
    (document,) = encode(files[name], {"text": "[INST] To be\n"})
    inner = common(files[name], ValidationMode.test).instruct_tokenizer.tokenizer
    ids = inner.encode("[INST] To be\n", bos=True, eos=True)
    assert document == Encoded.of(ids, [0.0, *[1.0] * (len(ids) - 1)])


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_what_a_user_says(name: str, files: dict[str, Path]) -> None:
    talk = [user(content="Hi"), said(content="Ho")]
    assert encode(files[name], {"prompt": "Hi", "completion": "Ho"}) == encode(files[name], line(talk))


@pytest.mark.parametrize("name", ["v13-tekken", "v15-tekken"])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_learnt(name: str, key: str, files: dict[str, Path]) -> None:
    value = line(TURNS[:4])
    value["messages"][1][key] = "Lamps are."
    value["messages"][3][key] = "So is oil."
    assert learnt(files[name], encode(files[name], value)) == [
        ["[THINK]Lamps are.[/THINK]2 kg, héavy, 👩‍🔬.</s>", "[THINK]So is oil.[/THINK]1 kg</s>"]
    ]


@pytest.mark.parametrize("name", ["v3", "v3-tekken", "v7", "v11-tekken"])
def test_ids_that_are_refused_are_replaced_in_call_and_answer(name: str, files: dict[str, Path]) -> None:
    value = line(TWO_CALLS, TOOLS)
    messages = value["messages"]
    for call, answer, new in zip(messages[1]["tool_calls"], messages[2:4], ("call_1", "call_2"), strict=True):
        call["id"] = answer["tool_call_id"] = new
    first, again = encode(files[name], value), encode(files[name], value)
    assert first == again
    (document,) = first
    text = own(files[name]).decode(document.ids.tolist())
    assert "call_1" not in text
    given = oracle(files[name], TWO_CALLS, TOOLS)
    assert len(text) == len(own(files[name]).decode(given))
    longer = encode(files[name], {**value, "messages": [*messages, {"role": "user", "content": "So?"}, messages[-1]]})
    assert learnt(files[name], longer)[0][0] == learnt(files[name], first)[0][0]
    messages[0]["content"] = "Weigh them"
    assert learnt(files[name], encode(files[name], value))[0][0] != learnt(files[name], first)[0][0]


@pytest.mark.parametrize("name", ["v3", "v7", "v11-tekken"])
def test_answers_without_ids_belong_to_the_calls_in_their_order(name: str, files: dict[str, Path]) -> None:
    value = line(TWO_CALLS, TOOLS)
    for answer in value["messages"][2:4]:
        del answer["tool_call_id"]
    assert encode(files[name], value) == encode(files[name], line(TWO_CALLS, TOOLS))
    for call in value["messages"][1]["tool_calls"]:
        del call["id"]
    (answers,) = learnt(files[name], encode(files[name], value))
    assert [len(answer) for answer in answers] == [len(called(name, CALL, SECOND)), len("3 kg</s>")]


def changed(talk: Talk, tools: list[Tool] | None = None, **fields: Any) -> dict[str, Any]:
    """The last message with other fields."""
    value = line(talk, tools)
    value["messages"][-1] |= fields
    return value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        pytest.param("v1", line(PLAIN, TOOLS), "tools does not reach the tokens: Mistral's tokenizer v1 encodes none here", id="tools"),
        pytest.param("v1", line(CALLS[2:6]), "Tools not implemented for tokenizer V1", id="calls"),
        pytest.param("v2", line(TWO_CALLS, TOOLS), "does not support multiple tool results", id="two results"),
        pytest.param("v3", changed(PLAIN, reasoning_content="Hm"), "Unexpected content chunk types in assistant message", id="thoughts in 3"),
        pytest.param("v11-tekken", changed(PLAIN, reasoning_content="Hm"), "Think not implemented for tokenizer < V13", id="thoughts in 11"),
        pytest.param("v13-tekken", changed(PLAIN, reasoning="Hm", thinking="Ha"), "is another thought than reasoning", id="two thoughts"),
        pytest.param("v3", changed(PLAIN, name="Ann"), "messages[1].name does not reach the tokens", id="name"),
        pytest.param("v3", changed(CALLS[:4], TOOLS, content="I weigh"), "either content or tool_calls, but not both", id="words and a call"),
        pytest.param("v7", line([said(content="Hi")]), "messages[0] is an assistant turn that follows nothing", id="first turn"),
        pytest.param("v7", line([*PLAIN, said(content="Oh")]), "Expected last role User or Tool", id="two answers"),
        pytest.param("v7", line([user(content="Hi")]), "has no assistant turn", id="no answer"),
        pytest.param("v11-tekken", line([*CALLS[2:4], CALLS[5]], TOOLS), "Expected last role User or Tool", id="a call without answer"),
        pytest.param("v3", line([PLAIN[0], ToolMessage(content="2"), said(content="2")]), "messages[1].tool_call_id is missing", id="an answer to no call"),
        pytest.param("v3", changed(CALLS[:4], TOOLS, tool_calls=[{"id": CALL.id, "function": {"name": "a b", "arguments": {}}}]), "Function name was a b", id="a name"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(name: str, value: dict[str, Any], expected: str, files: dict[str, Path]) -> None:
    found = refusal(files[name], value)
    assert expected in found
    assert "\n" not in found


def test_one_bad_sample_spoils_no_other(files: dict[str, Path]) -> None:
    values = [line(PLAIN), line([said(content="Hi")]), line(TURNS)]
    found = own(files["v7"]).encoder("Assistant").encode([read(value) for value in values])
    assert [isinstance(one, SampleError) for one in found] == [False, True, False]


def test_another_process_encodes_alike(files: dict[str, Path]) -> None:
    encoder = own(files["v11-tekken"]).encoder("Assistant")
    sample = read(line(CALLS, TOOLS))
    assert pickle.loads(pickle.dumps(encoder)).encode([sample]) == encoder.encode([sample])


def test_the_digest_tells_versions_and_files_apart(tmp_path: Path, files: dict[str, Path]) -> None:
    renamed = tmp_path / "tokenizer.model.v7"
    renamed.write_bytes(files["v3"].read_bytes())
    digests = {own(file).chat_digest for file in files.values()} | {own(renamed).chat_digest}
    # Version 7 with and without images has the same file: texts are encoded alike.
    assert files["v7"].read_bytes() == files["v7-images"].read_bytes()
    assert len(digests) == len(files) - 1 + 1
    assert all(digest.startswith("sha256:") for digest in digests)


def test_a_later_sentencepiece_without_its_version_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    nameless = tmp_path / "tokenizer.model"
    nameless.write_bytes(files["v3"].read_bytes())
    with pytest.raises(UnreadableError, match=r"rename it tokenizer\.model\.v2, \.v3 or \.v7"):
        OwnTokenizer(nameless)
    nameless.write_bytes(files["v1"].read_bytes())
    assert OwnTokenizer(nameless).version == "v1"


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, content in {"tekken.json": "{}", "tokenizer.model.v3": "x", "tokenizer.model.v99": "x"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UnreadableError, match=f"mistral-common refuses {name}"):
            OwnTokenizer(tmp_path / name)


SAID = (
    "How heavy?",
    "2 kg",
    " a lamp\n",
    "[INST] not a token",
    "</s>",
    "héavy 👩‍🔬",
    "so.\n\nYes",
    "oil ",
    "日本",
    "a",
    "\t1 2",
)


def plain_talk(dice: random.Random, *, system: bool) -> formats.Chat:
    """As likely with a turn to ask behind the last answer as without; some answers have weight 0, the last has not."""
    pairs = dice.choice([1, 1, 2, 3, 5, 9])
    roles = ["system"] * system + ["user", "assistant"] * pairs + ["user"] * dice.randrange(2)
    last = len(roles) - 1 - roles[::-1].index("assistant")
    weights = [int(role == "assistant" and (index == last or dice.random() < 0.8)) for index, role in enumerate(roles)]
    return formats.Chat([{"role": role, "content": dice.choice(SAID)} for role in roles], weights)


@pytest.mark.parametrize("loss_on", ["Assistant", "LastAssistant"])
@pytest.mark.parametrize("name", ALL)
def test_plain_talks_by_their_texts_are_as_mistral_common_has_them(
    files: dict[str, Path], name: str, loss_on: LossOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice, tokenizer = random.Random(name), own(files[name])
    talks: list[formats.Sample] = [plain_talk(dice, system=number % 3 == 0) for number in range(60)]
    quick = tokenizer.encoder(loss_on)
    found = quick.encode(talks)
    monkeypatch.setattr(Frames, "shape", lambda *_: None)
    for ours, theirs in zip(found, tokenizer.encoder(loss_on).encode(talks), strict=True):
        assert str(ours) == str(theirs) if isinstance(theirs, SampleError) else ours == theirs
    # The first version writes its marks as text; before the seventh a system prompt is part of a user's turn.
    number = int(name.removeprefix("v").split("-")[0])
    told = [has_system for has_system, since in ((False, 2), (True, 7)) if number >= since]
    assert sorted({kind[0] for kind in quick._frames._proved}) == told


def test_a_frame_that_does_not_hold_is_not_used(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the tokens between turns change behind the first conversations."""
    tokenizer, dice = own(files["v7-tekken"]), random.Random(0)
    encoder = tokenizer.encoder("Assistant")
    talks: list[formats.Sample] = [plain_talk(dice, system=False) for _ in range(30)]
    expected = tokenizer.encoder("Assistant").encode(talks)
    teach = mistral_frames._Frame.teach

    def wrongly(frame: Any, *taught: Any) -> bool:
        known = teach(frame, *taught)
        frame.between = {gap: ids[::-1].copy() for gap, ids in frame.between.items()}
        return known

    monkeypatch.setattr(mistral_frames._Frame, "teach", wrongly)
    assert encoder.encode(talks) == expected
    assert not encoder._frames._proved
