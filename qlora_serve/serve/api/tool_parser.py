"""Tool calls found in an answer's text as it comes."""

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_serve.serve.api.tool_format import LLAMA_TAG, ToolFormat

_SEPARATORS = frozenset(" \t\r\n,;[]")
# Up to the first brace of the arguments, in the order in which models write a call.
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{', re.S
)


_NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_LONGEST_HEAD = 256
"""Characters that name and id of a call may take, before its arguments."""


@dataclass(frozen=True)
class CallStart:
    """A call begins."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, as the model wrote them."""

    index: int
    text: str


Piece = str | CallStart | CallArguments
"""Text for the reader, or a part of a call."""


class ToolParser:
    """Splits one answer into text and calls.

    Text that only looks like a call comes out as text: nothing that the model wrote is lost, but
    for the markers, the space around calls, and further calls where only one is wanted.

    Args:
        form: the family's format.
        only_one: drop every call after the first.
    """

    def __init__(self, form: ToolFormat, only_one: bool = False) -> None:
        self._form = form
        self._only_one = only_one
        self._held = ""
        """Text that may yet turn out to be (before) a marker."""
        self._in_calls = False
        self._unused = ""
        """What was taken for a marker, until a call follows it; else it is text."""
        self._call: _Call | None = None
        # Without a marker, a call is what the whole answer begins with.
        self._undecided = not form.opening
        self.calls = 0
        """Calls so far."""

    def feed(self, text: str) -> list[Piece]:
        """Takes the next text and returns what is certain now."""
        pieces: list[Piece] = []
        for character in text:
            self._take(character, pieces)
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """What was held back, at the answer's end."""
        rest: list[Piece] = []
        if self._call is not None and not self._call.is_open:
            rest.append(self._unused + self._call.raw)
        elif self._in_calls:
            rest.append(self._unused + self._held if self._unused else "")
        elif not (self.calls and not self._held.strip()):  # space after calls belongs to them
            rest.append(self._held)
        self._call, self._held, self._unused = None, "", ""
        return _joined(rest)

    def _take(self, character: str, pieces: list[Piece]) -> None:
        if self._call is not None:
            self._in_call(character, pieces)
        elif self._in_calls:
            self._between_calls(character, pieces)
        else:
            self._in_text(character, pieces)

    def _in_text(self, character: str, pieces: list[Piece]) -> None:
        self._held += character
        if self._undecided:
            self._decide(pieces)
            return
        opening = self._form.opening
        if opening and self._held.endswith(opening):
            before = self._held[: -len(opening)].rstrip()
            self._unused = self._held[len(before) :]
            self._held, self._in_calls = "", True
            pieces.append(before)
            return
        # Held back: space, which may be before a call, and what may be a marker's beginning.
        keep = len(self._held) - len(self._held.rstrip())
        for length in range(min(len(self._held), len(opening) - 1), 0, -1):
            if self._held.endswith(opening[:length]):
                before = self._held[:-length]
                keep = length + len(before) - len(before.rstrip())
                break
        pieces.append(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def _decide(self, pieces: list[Piece]) -> None:
        start = self._held.lstrip()
        if not start or (LLAMA_TAG.startswith(start) and start != LLAMA_TAG):
            return
        self._undecided = False
        if start in (LLAMA_TAG, "{"):
            self._unused = self._held.removesuffix("{")
            self._held, self._in_calls = "", True
            if start == "{":
                self._between_calls("{", pieces)
            return
        pieces.append(self._held)
        self._held = ""

    def _in_name(self, character: str, pieces: list[Piece]) -> None:
        """Behind the marker of a format whose calls begin with their names."""
        found = _named(self._held, self._form) if character == "{" else None
        if found is not None:
            self._call = _Call(self.calls, *found)
            self._held, self._in_calls = "", False
            self._in_call(character, pieces)
            return
        held = self._held + character
        if character != "{" and len(held) <= _LONGEST_HEAD:
            self._held = held
            return
        # No call after all: back to text, in which another one may begin.
        pieces.append(self._unused)
        self._held, self._unused, self._in_calls = "", "", False
        for one in held:
            self._take(one, pieces)

    def _between_calls(self, character: str, pieces: list[Piece]) -> None:
        if self._form.separator:
            self._in_name(character, pieces)
            return
        closing = self._form.closing
        if character == "{" and not self._held:
            self._call = _Call(self.calls)
            self._in_call(character, pieces)
        elif closing and closing.startswith(self._held + character):
            self._held += character
            if self._held == closing:
                if self._unused:  # nothing was called between the markers
                    pieces.append(self._unused + closing)
                self._held, self._unused, self._in_calls = "", "", False
        elif self._held or character not in _SEPARATORS:
            # No call after all: back to text.
            pieces.append(self._unused + self._held)
            self._held, self._unused, self._in_calls = "", "", False
            self._in_text(character, pieces)
        elif self._unused:
            self._unused += character

    def _in_call(self, character: str, pieces: list[Piece]) -> None:
        call = self._call
        assert call is not None
        new = call.take(character)
        if call.is_done:
            self._call = None
            if not call.is_open:  # a JSON object that is no call
                pieces.append(self._unused + call.raw)
                self._unused, self._in_calls = "", False
                return
        if new and isinstance(new[0], CallStart):
            self.calls += 1
            self._unused = ""
        if not (self._only_one and call.index > 0):
            pieces += new


class _Call:
    """Reads one call's JSON object character by character."""

    def __init__(self, index: int, name: str | None = None, call_id: str | None = None) -> None:
        self.index = index
        self._name = name
        """Where it stands before the JSON, which is then the arguments alone."""
        self._id = call_id
        self.raw = ""
        self.is_open = False
        """Whether a name was found, so that this is a call."""
        self.is_done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_arguments = False

    def take(self, character: str) -> list[Piece]:
        """Takes one character; returns what can be given out."""
        self.raw += character
        self._count(character)
        if self._name is not None:
            return self._take_argument(character, self._name)
        if self._depth == 0:
            self.is_done = True
            return [] if self.is_open else self._whole()
        if self._in_arguments:
            # The closing brace of the arguments is still theirs.
            self._in_arguments = self._in_string or self._depth > 1
            return [CallArguments(self.index, character)]
        head = _HEAD.fullmatch(self.raw) if character == "{" and not self.is_open else None
        if head is None:
            return []
        try:
            name = json.loads(head[1], strict=False)
        except ValueError:  # an escape that JSON does not have
            return []
        self.is_open = self._in_arguments = True
        return [self._start(name), CallArguments(self.index, "{")]

    def _take_argument(self, character: str, name: str) -> list[Piece]:
        """Takes one character of a JSON object that is all arguments."""
        self.is_done = self._depth == 0
        if self.is_open:
            return [CallArguments(self.index, character)]
        self.is_open = True
        return [self._start(name), CallArguments(self.index, character)]

    def _count(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _start(self, name: str) -> CallStart:
        # Nine letters and digits: what Mistral's templates take back.
        return CallStart(self.index, self._id or uuid.uuid4().hex[:9], name)

    def _whole(self) -> list[Piece]:
        """A call whose keys came in another order, or whose arguments are no plain object."""
        try:
            call: Any = json.loads(self.raw, strict=False)
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters"))
        if arguments is None:
            if call.keys() != {"name"}:
                return []
            arguments = {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        self.is_open = True
        return [self._start(call["name"]), CallArguments(self.index, text)]


def _named(head: str, form: ToolFormat) -> tuple[str, str | None] | None:
    """The name and the id of `name[CALL_ID]id[ARGS]`; None for text that is no such head."""
    if not head.rstrip().endswith(form.separator):
        return None
    name, mark, call_id = head.rstrip().removesuffix(form.separator).partition(form.id_mark)
    parts = [name.strip(), *([call_id.strip()] if mark else [])]
    if not all(map(_NAME.fullmatch, parts)):
        return None
    return parts[0], parts[1] if mark else None


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts, and neighbouring arguments of one call, as one piece; no empty ones."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif (
            isinstance(piece, CallArguments)
            and isinstance(last, CallArguments)
            and piece.index == last.index
        ):
            joined[-1] = CallArguments(piece.index, last.text + piece.text)
        elif piece:
            joined.append(piece)
    return joined


def whole_calls(pieces: Iterable[Piece]) -> tuple[str, list[dict[str, Any]]]:
    """The text and the `tool_calls` of a message."""
    text = ""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        elif isinstance(piece, CallStart):
            function = {"name": piece.name, "arguments": ""}
            calls[piece.index] = {"id": piece.call_id, "type": "function", "function": function}
        else:
            calls[piece.index]["function"]["arguments"] += piece.text
    return text, list(calls.values())


def assistant_message(text: str, parser: ToolParser | None) -> dict[str, Any]:
    """The assistant's turn of a whole answer, with its calls if a parser finds some."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if parser is not None:
        content, calls = whole_calls([*parser.feed(text), *parser.finish()])
        message["content"] = content or (None if calls else "")
        if calls:
            message["tool_calls"] = calls
    return message


def piece_delta(piece: Piece) -> dict[str, Any]:
    """The `delta` of a streamed chunk."""
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, CallStart):
        call: dict[str, Any] = {"index": piece.index, "id": piece.call_id, "type": "function"}
        return {"tool_calls": [call | {"function": {"name": piece.name, "arguments": ""}}]}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
