"""Reading chats, and every way in which a file can be wrong."""

import hashlib
import json
from pathlib import Path

import pytest

from qlora_serve.errors import DataError
from qlora_serve.train.data import read_chats

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    second = GOOD.replace('"b"', '"\u2028 ü"')
    file.write_text(f"\ufeff{GOOD}\n\n{second}\n", encoding="utf-8")
    data = read_chats(file)
    assert [row.where for row in data.rows] == [f"{file}, line 1", f"{file}, line 3"]
    assert data.rows[1].messages[1] == {"role": "assistant", "content": "\u2028 ü"}
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_json_array_with_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    row = json.loads(GOOD)
    file.write_text(json.dumps([row | {"type": "chatml", "source": "mine"}, row]))
    data = read_chats(file)
    assert [row.where for row in data.rows] == [f"{file}, row 1", f"{file}, row 2"]
    assert data.rows[0].messages == row["messages"]


def _messages(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


_USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"{\xff}", "line 1 is not UTF-8"),
        (GOOD.encode() + b"\n{'a'", "line 2 is not JSON"),
        (b"[1]", "line 1 is an array"),
        (b"{}", "line 1 has nothing; expected messages, or conversations, or instruction and"),
        (b'{"prompt": "x"}', "line 1 has prompt; expected .* or prompt and completion"),
        (b'{"messages": "x"}', '"messages" is a string'),
        (b'{"messages": []}', "no assistant turn"),
        (_messages(_USER), "no assistant turn"),
        (_messages("hello"), "message 1 is a string"),
        (_messages(_USER, {"role": "robot", "content": "b"}), "message 2 has the role 'robot'"),
        (_messages({"content": "b"}), "has the role None"),
        (_messages(_USER, {"role": "assistant", "content": None}), "nothing as content"),
        (_messages(_USER, {"role": "assistant", "content": ["b"]}), "an array as content"),
        (_messages(_USER, {"role": "assistant", "content": " \n"}), "empty assistant turn"),
        (_messages(_USER | {"weight": 1}), "message 1 has weight"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (GOOD[:-1].encode() + b', "type": "alpaca"}', "type 'alpaca'; expected chatml"),
        (GOOD[:-1].encode() + b', "tools": [{}]}', "tool 1 is no function"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_chats(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "is not JSON"),
        (GOOD.replace("{", "{\n", 1), "holds an object; expected an array of rows"),
        ("[]", "holds no rows"),
        (f"[{GOOD}, 3]", "row 2 is a number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(DataError, match=reason):
        read_chats(file)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file at"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no data file at"):
        read_chats(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a .txt file; expected one of: .jsonl, .json, .csv"):
        read_chats(tmp_path / "a.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        read_chats(tmp_path / "folder.json")
