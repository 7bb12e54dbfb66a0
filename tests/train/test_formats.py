"""Every format and kind of file, read into the same chats."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_serve.errors import DataError
from qlora_serve.train.data import (
    ChatData,
    duplicates,
    hold_out,
    read_chats,
    read_sources,
    weighted,
)
from qlora_serve.train.sources import Source, parse_source

CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def _write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": CHAT, "source": "x", "type": "chatml"}, "chatml", CHAT),
        ({"conversations": [{"from": "human", "value": "Where?"},
                            {"from": "gpt", "value": "Here."}], "id": "1"}, "conversations", CHAT),
        ({"conversations": [{"from": "user", "value": "Where?"},
                            {"from": "assistant", "value": "Here."}]}, "conversations", CHAT),
        ({"conversations": [{"from": "system", "value": "Be brief."},
                            {"from": "human", "value": "Where?"},
                            {"from": "gpt", "value": "Here."}]},
         "conversations", [SYSTEM, *CHAT]),
        ({"system": "Be brief.", "conversations": CHAT}, "conversations", [SYSTEM, *CHAT]),
        ({"instruction": "Where?", "input": "", "output": "Here.", "text": "all of it"}, "alpaca",
         CHAT),
        ({"instruction": "Wh", "input": "ere?", "output": "Here.", "system": "Be brief."}, "alpaca",
         [SYSTEM, {"role": "user", "content": "Wh\n\nere?"}, CHAT[1]]),
        ({"instruction": "Where?", "output": "Here.", "history": [["a", "b"]]}, "alpaca",
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *CHAT]),
        ({"prompt": "Where?", "completion": "Here."}, "prompt/completion", CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt/completion", CHAT),
        ({"question": "Where?", "answer": "Here."}, "question/answer", CHAT),
        ({"ask": "Where?", "answer": "Here.", "department": "x"}, "question/answer", CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Whe"},
                                                    {"type": "text", "text": "re?"}]}, CHAT[1]]},
         "chatml", CHAT),
    ],
)  # fmt: skip
def test_formats_are_recognised_by_their_keys(
    tmp_path: Path, row: Any, name: str, messages: Any
) -> None:
    data = read_chats(_write(tmp_path, [row]))
    assert data.sources[0].format == name
    assert data.rows[0].messages == messages


def test_templated_text(tmp_path: Path) -> None:
    data = read_chats(_write(tmp_path, [{"text": "### Human: a### Assistant: b</s>"}]))
    assert data.sources[0].format == "text"
    assert data.rows[0].text == "### Human: a### Assistant: b</s>"
    assert data.rows[0].messages == []


def test_tools_calls_and_results_survive(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"id": "c1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
    openai = {
        "messages": [
            CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}, result, CHAT[1]
        ],
        "tools": tools,
    }  # fmt: skip
    shared = {
        "conversations": [
            {"from": "human", "value": "Where?"},
            {
                "from": "function_call",
                "value": '{"name": "weather", "arguments": {"city": "Bonn"}}',
            },
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "Here."},
        ],
        "tools": json.dumps(tools),
    }
    (first,) = read_chats(_write(tmp_path, [openai], "a.jsonl")).rows
    (second,) = read_chats(_write(tmp_path, [shared], "b.jsonl")).rows
    expected = {"name": "weather", "arguments": {"city": "Bonn"}}
    for row in (first, second):
        assert row.tools == tools
        assert [m["role"] for m in row.messages] == ["user", "assistant", "tool", "assistant"]
        assert row.messages[1]["content"] == ""
        assert row.messages[1]["tool_calls"][0]["function"] == expected
        assert row.messages[2]["content"] == "rain"
    assert first.messages[2]["tool_call_id"] == "c1"


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"question": 'Where, "x"?\nNow?', "answer": "Here."}, {"question": "a", "answer": "ü"}]
    _write(tmp_path, rows, "a.jsonl")
    _write(tmp_path, rows, "lines.json")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["Question", "Answer"], *([*row.values()] for row in rows)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = {
        path.name: [row.messages for row in read_chats(path).rows] for path in tmp_path.iterdir()
    }
    assert len(read) == 6
    assert all(messages == read["a.jsonl"] for messages in read.values())
    (first, second) = read_chats(tmp_path / "a.csv").rows
    assert first.where.endswith("a.csv, line 2")
    assert second.where.endswith("a.csv, line 4")  # the first row has a line break in it


def test_nested_parquet_keeps_no_empty_keys(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": "1"}}}
    other = {"function": {"name": "g", "arguments": {"y": "2"}}}
    rows = [
        {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": "b", "tool_calls": [other]}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_chats(tmp_path / "a.parquet").rows
    assert first.messages[0] == CHAT[0]
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": "1"}
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"y": "2"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"instruction": 3, "output": "b"}', 'line 1 has a number as "instruction"'),
        ("a.jsonl", '{"prompt": "a", "completion": ["b"]}', 'has an array as "completion"'),
        ("a.jsonl", '{"text": " "}', 'has an empty "text"'),
        ("a.jsonl", '{"question": "a", "answer": " "}', "message 2 is an empty assistant turn"),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "a", "weight": 1}]}',
         "turn 1 has weight; only from and value"),
        ("a.jsonl", '{"conversations": [{"from": "moon", "value": "a"}]}', "turn 1 has the role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
         "message 1 has an array as content"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}',
         "message 1 has a tool call without"),
        ("a.jsonl", '{"text": "a"}\n{"question": "a", "answer": "b"}',
         "line 2 is question/answer, but the rows before it are text"),
        ("a.jsonl", '{"conversations": [{"from": "gpt", "value": "a", "loss": 0}]}',
         "turn 1 has loss; only from and value"),
        ("a.jsonl", '{"conversations": [{"role": "assistant", "content": "a", "loss": false}]}',
         "turn 1 has loss"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
         "message 1 has weight"),
        ("a.jsonl", '{"text": "a"}\n{"text" "b"}',
         r"line 2 is not JSON: Expecting ':' delimiter \(column 9\)"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]',
         r"is not JSON: Expecting ':' delimiter \(line 2, column 9\)"),
        ("a.csv", 'question,answer\na,b,c\n', "line 2 has 3 cells; expected 2"),
        ("a.csv", 'question,answer\na\n', "line 2 has 1 cell; expected 2"),
        ("a.csv", 'question,answer\n"a,b\n', "line 2 is not CSV"),
        ("a.csv", "question,answer\n", "holds no rows"),
        ("a.csv", "question,reply\na,b\n", "line 2 has question, reply; expected"),
        ("a.parquet", "PAR1", "is not a Parquet file"),
        ("a.json", '[{"text": "a"}, {"text": 1}]', 'row 2 has a number as "text"'),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_chats(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_rows_are_collected(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "{", '{"text": 1}', '{"text": "b"}', "[]"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    data = read_sources([Source(str(path))])
    assert len(data.rows) == 2
    assert [p.where.rpartition(" ")[2] for p in data.problems] == ["2", "3", "5"]
    with pytest.raises(DataError, match=r"line 2 .*\(2 more rows cannot be used"):
        read_chats(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("a.jsonl:0.3", Source("a.jsonl", 0.3)),
        ("a.jsonl:2", Source("a.jsonl", 2)),
        ("hub:org/name:.5", Source("hub:org/name", 0.5)),
        ("modelscope:org/name", Source("modelscope:org/name")),
    ],
)
def test_weights_stand_behind_a_colon(text: str, expected: Source) -> None:
    assert parse_source(text) == expected


def test_a_file_whose_name_ends_like_a_weight(tmp_path: Path) -> None:
    path = _write(tmp_path, [{"text": "a"}], "data:2")
    assert parse_source(str(path)) == Source(str(path))
    with pytest.raises(ValueError, match="above 0"):
        parse_source("a.jsonl:0")


def _texts(data: ChatData) -> list[str]:
    return [row.text or "" for row in data.rows]


def test_weights_take_copies_and_parts(tmp_path: Path) -> None:
    files = [_write(tmp_path, [{"text": f"{n}{i}"} for i in range(10)], f"{n}.jsonl") for n in "ab"]
    weights = (0.3, 2.5)
    sources = [Source(str(file), weight) for file, weight in zip(files, weights, strict=True)]
    taken = _texts(weighted(read_sources(sources), seed=1))
    assert sum(text[0] == "a" for text in taken) == len({t for t in taken if t[0] == "a"}) == 3
    counts = [taken.count(f"b{i}") for i in range(10)]
    assert sorted(counts) == [2] * 5 + [3] * 5
    assert taken == _texts(weighted(read_sources(sources), seed=1))
    assert taken != _texts(weighted(read_sources(sources), seed=2))
    assert _texts(read_sources(sources, limit=2)) == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(("share", "held"), [(0.25, 10), (7, 7), (39, 39)])
def test_held_out_rows_are_never_trained_on(tmp_path: Path, share: float, held: int) -> None:
    # Every text stands in the file twice, but for the last two.
    rows = [{"text": str(i // 2 if i < 38 else i)} for i in range(40)]
    data = read_chats(_write(tmp_path, rows))
    train, evaluation = hold_out(data, share, seed=0)
    assert len(evaluation.rows) in (held, held - 1)
    assert len(train.rows) + len(evaluation.rows) == 40
    assert not set(_texts(train)) & set(_texts(evaluation))
    assert len(duplicates(data.rows)) == 19


def test_nothing_may_be_left_over(tmp_path: Path) -> None:
    data = read_chats(_write(tmp_path, [{"text": "a"}, {"text": "b"}]))
    with pytest.raises(DataError, match="nothing to train on"):
        hold_out(data, 2, seed=0)
    same = read_chats(_write(tmp_path, [{"text": "a"}, {"text": "a"}], "b.jsonl"))
    with pytest.raises(DataError, match="nothing to evaluate"):
        hold_out(same, 1, seed=0)


def test_a_local_data_set_directory(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    _write(folder, [{"text": "a"}, {"text": "b"}], "train.jsonl")
    _write(folder, [{"text": "c"}], "test.jsonl")
    data = read_chats(folder)
    assert _texts(data) == ["a", "b"]
    assert data.rows[1].where == f"{folder}, row 2"
    assert data.sha256 == read_chats(folder).sha256
    assert len(data.sha256) == 64


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-org/no-such-data", "not a file, and not to be loaded"),
        ("hub:no-org/no-such-data@config#test", "no data at 'hub:no-org"),
        ("modelscope:no-org/no-such-data", "needs modelscope: pip install"),
        ("ftp:a/b", "no data file at ftp:a/b"),
    ],
)
def test_data_sets_that_cannot_be_reached(name: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_chats(name)
    assert "\n" not in str(caught.value)
