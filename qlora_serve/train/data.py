"""Reading chats: JSON Lines or a JSON array of rows, checked one by one."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.errors import DataError

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatRow:
    """One chat of a data file."""

    messages: list[Message]
    """`{"role": ..., "content": ...}` in order; at least one is the assistant's."""
    where: str
    """The file and the line or row number, for errors."""


@dataclass(frozen=True)
class ChatData:
    """A data file, read and checked."""

    path: Path
    sha256: str
    """Of the file's bytes, in hexadecimal."""
    rows: list[ChatRow]


def read_chats(path: Path) -> ChatData:
    """Reads a file of chats.

    A row is `{"messages": [{"role": "user", "content": "..."}, ...]}`. Other keys of a row, such
    as its source, are left out; those that would change what the model sees are refused.

    Raises:
        DataError: the file cannot be read, or a row cannot be used; names the file and the line.
    """
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path} is a {path.suffix or 'nameless'} file; expected .jsonl or .json")
    content = _read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    items = _json_rows(path, content) if path.suffix == ".json" else _lines(path, content)
    rows = [ChatRow(_check_row(item, where), where) for item, where in items]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return ChatData(path, digest, rows)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no data file at {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if not content.strip():
        raise DataError(f"{path} is empty")
    return content


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None


def _lines(path: Path, content: bytes) -> Iterator[tuple[Any, str]]:
    # Split at "\n" alone: JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse(_decode(line, where), where), where


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[Any, str]]:
    items = _parse(_decode(content, str(path)), str(path))
    if not isinstance(items, list):
        raise DataError(
            f"{path} holds {_kind(items)}; expected an array of rows, or a .jsonl file of one row "
            "a line"
        )
    for number, item in enumerate(items, start=1):
        yield item, f"{path}, row {number}"


def _check_row(row: Any, where: str) -> list[Message]:
    if not isinstance(row, dict):
        raise DataError(f'{where} is {_kind(row)}; expected an object with "messages"')
    kind = row.get("type", "chatml")
    if kind != "chatml":
        raise DataError(f"{where} has type {kind!r}; expected chatml")
    if row.get("tools"):
        raise DataError(f"{where} has tools, which cannot be trained on yet; leave them out")
    if "messages" not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f'{where} has no "messages"; it has {found}')
    messages = row["messages"]
    if not isinstance(messages, list):
        raise DataError(f'{where}: "messages" is {_kind(messages)}; expected an array')
    checked = [
        _check_message(message, f"{where}, message {number}")
        for number, message in enumerate(messages, start=1)
    ]
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(f"{where} has no assistant turn, so there is nothing to learn from it")
    return checked


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f'{where} is {_kind(message)}; expected {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; expected one of: {', '.join(ROLES)}")
    # Keys such as `tool_calls` or `weight` change what is learned: dropping them would be wrong.
    extra = sorted(key for key in message if key not in ("role", "content") and message[key])
    if extra:
        raise DataError(f"{where} has {', '.join(extra)}; only role and content can be trained on")
    if not isinstance(content, str):
        raise DataError(f"{where} has {_kind(content)} as content; expected text")
    if role == "assistant" and not content.strip():
        raise DataError(f"{where} is an empty assistant turn")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair ({error.start})") from None
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    if value is None:
        return "nothing"
    return names.get(type(value), "a number")
