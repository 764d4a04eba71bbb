"""Files as people have them: what is read without a word, and what each broken one is told."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneward_trainer.data import formats
from tuneward_trainer.data.files import data_files, parse, read, read_lines
from tuneward_trainer.data.problems import Problem, Problems, SampleError

A, B = b'{"text": "a"}', b'{"text": "b"}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (A + b"\n" + B + b"\n", [(1, A), (2, B)]),
        (A + b"\n" + B, [(1, A), (2, B)]),
        (b"\xef\xbb\xbf" + A + b"\r\n\r\n  \n" + B + b"\r\n", [(1, A), (4, B)]),
        (A + b"\n\xef\xbb\xbf" + B, [(1, A), (2, B)]),
        (b"", []),
        (b"\n\n", []),
        ('{"text": "a\u2028b\x85c"}\n'.encode(), [(1, '{"text": "a\u2028b\x85c"}'.encode())]),
        (gzip.compress(A + b"\n" + B[:5]) + gzip.compress(B[5:]), [(1, A), (2, B)]),
        (gzip.compress(A) + b"\0" * 512, [(1, A)]),
        (gzip.compress(A) + b"garbage", [(1, A)]),
        (gzip.compress(b""), []),
    ],
    ids=[
        "plain",
        "no last newline",
        "marks and blanks",
        "mark inside",
        "empty",
        "blank",
        "separators",
        "members",
        "zeros",
        "garbage",
        "nothing",
    ],
)
def test_lines(tmp_path: Path, content: bytes, expected: list[tuple[int, bytes]]) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    assert list(read_lines(file)) == expected


def test_lines_longer_than_a_read(tmp_path: Path) -> None:
    lines = [b"x" * 700_000, b"y" * 2_500_000, b"z"]
    for name, content in [("a", b"\n".join(lines)), ("b", gzip.compress(b"\n".join(lines), 1))]:
        (tmp_path / name).write_bytes(content)
        assert [line for _, line in read_lines(tmp_path / name)] == lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(A * 50)[:-9], "^the file ends in the middle of its gzip stream"),
        (gzip.compress(A * 50)[:-8] + b"\xff" * 8, "^the file is a broken gzip stream"),
    ],
    ids=["cut", "wrong sum"],
)
def test_a_broken_file_says_so(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "data.jsonl.gz").write_bytes(content)
    with pytest.raises(SampleError, match=expected):
        list(read_lines(tmp_path / "data.jsonl.gz"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"a": "b", "c": [{"d": 1}, 2], "e": {"a": null}}', {"a": "b", "c": [{"d": 1}, 2], "e": {"a": None}}),
        ('{"a": "\\":", "b" :1}', {"a": '":', "b": 1}),
        ('{"a": 1, "a": 2}', ' has the key "a" twice'),
        ('{"a" :1, "a"\t: 2}', ' has the key "a" twice'),
        ('{"\\u0061": 1, "a": 2}', ' has the key "a" twice'),
        ('{"a": [0, [{"b": 1, "b": 2}]]}', r'a\[1\]\[0\] has the key "b" twice'),
        ('{"a": {"c": {"b": 1, "b": 2}}, "a": 3}', r'a\.c has the key "b" twice'),
        # What stands behind is no JSON: then the place is not known.
        ('{"a": {"b": 1, "b": 2}, "c"', ' has the key "b" twice'),
        ('[{"a": 1, "a": 2}]', r'\[0\] has the key "a" twice'),
        ('{"a": {"b": 1}, "c"', " is no JSON"),
        ("[" * 100_000, " is no JSON"),
    ],
)
def test_a_key_that_is_there_twice_is_said_before_what_stands_behind_it(line: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(SampleError, match=f"^{expected}"):
            parse(line.encode())
    else:
        assert parse(line.encode()) == expected


def test_a_folder_stands_for_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.txt", ".hidden.jsonl", "d.parquet", "e.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    assert data_files(tmp_path) == [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl", "d.parquet", "e.jsonl.zst")]


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1},
    {
        "messages": [
            {"role": "user", "content": "c"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": "é"}}}]},
        ]
    },
]


def test_rows_of_a_table_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS * 300), tmp_path / "a.parquet", row_group_size=7)
    assert list(read(tmp_path / "a.parquet")) == list(enumerate(ROWS * 300, 1))


def test_a_table_is_read_a_piece_at_a_time(tmp_path: Path) -> None:
    """One row group of 96 MB: memory must not hold it."""
    text = "x" * 96
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("text", pa.string())]), compression="none", use_dictionary=False
    ) as file:
        file.write_table(pa.table({"text": [text] * 1_000_000}), row_group_size=1_000_000)
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for _, row in read(tmp_path / "a.parquet"):
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
        assert row == {"text": text}
    assert most < 16 << 20


def zstd(*frames: bytes) -> bytes:
    return b"".join(pa.compress(frame, codec="zstd", asbytes=True) for frame in frames)


def test_zstd_frames(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl.zst").write_bytes(zstd(A + b"\n" + B[:5], B[5:] + b"\n"))
    assert list(read(tmp_path / "data.jsonl.zst")) == [(1, A), (2, B)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (zstd(A * 50)[:-9], "^the file is a broken zstd stream"),
        (zstd(A) + b"garbage", "^the file is a broken zstd stream"),
        (b"PAR1" + b"x" * 40, "^the file is a broken Parquet file"),
    ],
    ids=["cut", "garbage", "no table"],
)
def test_a_broken_table_or_stream_says_so(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(SampleError, match=expected):
        list(read(tmp_path / "data"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "a"} x', "is no JSON (Extra data: line 1 column 15 (char 14))"),
        (b'{"text": "\xff"}', "is no UTF-8 at byte 11"),
        ('{"text": "a"}'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        (b'[{"text": "a"}]', "is a JSON array: write jq -c '.[]' FILE"),
        (b'[{"text": "a"},', "looks like one JSON array: write jq -c '.[]' FILE"),
        (b"3", "is 3"),
        (b"[" * 100_000, " is no JSON"),
    ],
)
def test_a_line_that_is_no_object(line: bytes, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse(line)
    assert expected in str(caught.value)


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def user_then(**assistant: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **assistant}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"question": "a"},
            ' has the fields ["question"]; allowed: chosen and rejected; input and preferred_output and non_preferred_output; '
            "messages; prompt and completion; conversations; instruction and output; text;",
        ),
        ({"conversations": []}, "conversations is []; allowed: a list of at least one message"),
        ({"conversations": [3]}, "conversations[0] is 3; allowed: an object with from and value"),
        (sharegpt(("bot", "a")), 'conversations[0].from is "bot"; allowed: human, user, gpt'),
        ({"conversations": [{"value": "a"}]}, "conversations[0].from is missing; allowed: human, user, gpt"),
        (sharegpt(("human", 3)), "conversations[0].value is 3; allowed: a text"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value is missing; allowed: a text"),
        ({"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "conversations[0].content stands beside value"),
        (
            {"conversations": [{"from": "gpt", "value": "a", "mood": "b"}]},
            "conversations[0].mood is a field that no template",
        ),
        (sharegpt(("function_call", "f(x)")), "conversations[0].value is no JSON"),
        (sharegpt(("function_call", "[3]")), 'conversations[0].value is [3]; allowed: {"name": …'),
        (sharegpt(("human", "a")) | {"system": 3}, "system is 3; allowed: a text"),
        ({"instruction": "a", "output": ""}, "output is empty; allowed: a text"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, 'input is ["c"]; allowed: a text'),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "history would not be learnt from; allowed: only instruc",
        ),
        (user_then(content="b") | {"system": "c"}, "system would not be learnt from; allowed: only messages, tools"),
        ({"messages": None}, "messages is null; allowed: a list of at least one message"),
        ({"messages": []}, "messages is []; allowed: a list of at least one message"),
        ({"messages": ["a"]}, 'messages[0] is "a"; allowed: an object with role and content'),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing; allowed: system, developer, user, assistant, tool"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 'messages[0].role is "bot"; allowed: system, developer, user'),
        (user_then(), "messages[1].content is missing; allowed: a text"),
        (user_then(content=None), "messages[1].content is null; allowed: a text"),
        (user_then(content=3), "messages[1].content is 3; allowed: a text"),
        (
            user_then(content=" "),
            'messages[1].content is " ": the model would learn to say nothing; allowed: a text, or weight',
        ),
        (user_then(content="b", weight=0.5), "messages[1].weight is 0.5; allowed: 0 or 1"),
        (user_then(content="b", weight=True), "messages[1].weight is true; allowed: 0 or 1"),
        (user_then(content="b", mood="good"), "messages[1].mood is a field that no template reads; allowed: role, content"),
        (user_then(content="b", tool_calls=3), "messages[1].tool_calls is 3; allowed: a list of calls"),
        (user_then(tool_calls=[{"function": {}}]), 'messages[1].tool_calls[0] is {"function": {}}; allowed: '),
        (
            user_then(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "messages[1].tool_calls[0].function.arguments is no JSON",
        ),
        (user_then(content=[{"type": "image_url"}]), 'messages[1].content[0] is a part of type "image_url"; allowed: parts'),
        (user_then(content="\ud800"), "messages[1].content holds half a character at 1 (a lone surrogate)"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            "messages[0].weight is 1 on a turn of user; allowed: 1 on assistant turns only",
        ),
        (user_then(content="b") | {"tools": "{"}, "tools is no JSON"),
        (user_then(content="b") | {"images": ["x.png"]}, "images would not be learnt from; allowed: only messages, tools"),
        ({"prompt": "a", "completion": None}, "completion is null; allowed: a text"),
        ({"prompt": "a", "completion": ""}, "completion is empty; allowed: a text"),
        ({"prompt": "a", "completion": " "}, 'completion is " ": the model would learn to say nothing; allowed: a text'),
        ({"instruction": "a", "output": "\n"}, 'output is "\\n": the model would learn to say nothing; allowed: a text'),
        ({"text": ["a"]}, 'text is ["a"]; allowed: a text'),
        ({"text": ""}, "text is empty; allowed: a text"),
    ],
)
def test_a_sample_that_cannot_be_learnt_from(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        formats.read(value, formats.detect(value))
    assert str(caught.value).startswith(expected)


def test_every_bad_message_of_a_sample_is_named() -> None:
    value = {"messages": [{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant"}]}
    with pytest.raises(SampleError) as caught:
        formats.read(value, "Messages")
    assert caught.value.at("f.jsonl", 7) == [
        Problem("f.jsonl", 7, "messages[0].role", 'is "bot"', "system, developer, user, assistant, tool"),
        Problem("f.jsonl", 7, "messages[2].content", "is missing", "a text"),
    ]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            user_then(content="b", weight=0, tool_calls=None),
            formats.Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [0, 0]),
        ),
        (
            user_then(content=None, tool_calls=[CALL | {"function": {"name": "f", "arguments": '{"x": 1}'}}])
            | {"tools": "[]"},
            formats.Chat(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [0, 1]
            ),
        ),
        (
            user_then(content=[{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]),
            formats.Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\nc"}], [0, 1]),
        ),
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            formats.Chat(
                [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
                [0, 1],
                field="completion",
                paths=("prompt[0]", "completion[0]"),
            ),
        ),
        ({"prompt": "", "completion": "b"}, formats.PromptCompletion("", "b")),
        ({"text": "a", "id": 3}, formats.Text("a")),
        (
            sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("chatgpt", "d")),
            formats.Chat(
                [
                    {"role": role, "content": content}
                    for role, content in zip(["system", "user", "assistant", "user", "assistant"], "sabcd", strict=True)
                ],
                [0, 0, 1, 0, 1],
                field="conversations",
            ),
        ),
        (
            sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "3"))
            | {"system": "s", "tools": "[]"},
            formats.Chat(
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    },
                    {"role": "tool", "content": "3"},
                ],
                [0, 0, 1, 0],
                field="conversations",
                paths=("system", "conversations[0]", "conversations[1]", "conversations[2]"),
            ),
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
            formats.Chat(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [0, 0], field="conversations"
            ),
        ),
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "Below is an instruction …"},
            formats.Chat(
                [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}],
                [0, 1],
                field="output",
                paths=("instruction", "output"),
            ),
        ),
        (
            {"instruction": "a", "input": "", "output": "c", "system": "s"},
            formats.Chat(
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "c"},
                ],
                [0, 0, 1],
                field="output",
                paths=("system", "instruction", "output"),
            ),
        ),
    ],
)
def test_samples(value: dict[str, Any], expected: formats.Sample) -> None:
    assert formats.read(value, formats.detect(value)) == expected


def test_a_summary_of_problems_fits_its_limit() -> None:
    problems = Problems()
    problems.extend(Problem("pvc://data/train.jsonl", line, "text", "is empty", "a text") for line in range(1, 20_001))
    assert problems.summary(220) == (
        "20000 problems in the data: pvc://data/train.jsonl:1: text is empty; allowed: a text; "
        "pvc://data/train.jsonl:2: text is empty; allowed: a text … and 19998 more"
    )
    assert problems.lines()[-1] == "… and 10000 more"
    assert len(problems.lines()) == 10_001
