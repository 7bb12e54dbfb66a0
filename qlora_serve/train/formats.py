"""The formats of training rows, recognised by their keys and turned into chats.

Whatever a row was written as, what trains is one list of messages in OpenAI's form, with the tools
that it offers, or one text that was already templated. Nothing that would change what the model
learns is left out silently: a key or a kind of content that has no place here is a refusal.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_serve.train.sources import kind_of

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")

# The names of roles in the formats that people share: OpenAI's, ShareGPT's, Qwen's, Gemma's.
_ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip

# What a message may hold besides role and content, by role.
_MESSAGE_KEYS = {
    "system": (),
    "user": ("name",),
    "assistant": ("tool_calls", "reasoning_content", "name"),
    "tool": ("name", "tool_call_id"),
}


class RowError(ValueError):
    """Why a row cannot be used; `place` says where in the row, such as `, message 2`."""

    def __init__(self, reason: str, place: str = "") -> None:
        self.place = place
        super().__init__(reason)


@dataclass(frozen=True)
class RowContent:
    """What a row holds: a chat, or a text that was already templated."""

    messages: list[Message] = field(default_factory=list)
    """At least one is the assistant's; empty for a text."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of the functions that the chat may call, as JSON schemas."""
    text: str | None = None


@dataclass(frozen=True)
class Format:
    """A way to write a row."""

    name: str
    keys: tuple[tuple[str, ...], ...]
    """It is recognised by one key of each of these groups."""
    read: Callable[[Mapping[str, Any]], RowContent]

    @property
    def wanted(self) -> str:
        """The keys that tell it, in words."""
        return " and ".join(group[0] for group in self.keys)


def recognise(row: Any) -> Format | None:
    """The format of a row, told by its keys; None if it is like none that is known."""
    if not isinstance(row, dict):
        return None
    held = {key for key, value in row.items() if value is not None}
    for known in FORMATS:
        if all(held & set(group) for group in known.keys):
            return known
    return None


def read_row(row: Any, expected: Format | None) -> tuple[Format, RowContent]:
    """Reads a row.

    Args:
        row: as it was stored.
        expected: the format of its file, where that is known already.

    Raises:
        RowError: the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f'is {kind_of(row)}; expected an object, such as {{"messages": [...]}}')
    found = recognise(row)
    if found is None:
        keys = ", ".join(str(key) for key, value in row.items() if value is not None) or "nothing"
        wanted = [expected] if expected else FORMATS
        raise RowError(f"has {keys}; expected {', or '.join(known.wanted for known in wanted)}")
    if expected is not None and found.name != expected.name:
        raise RowError(f"is {found.name}, but the rows before it are {expected.name}")
    kind = row.get("type")
    if isinstance(kind, str) and found.name == "chatml" and kind != "chatml":
        raise RowError(f"has type {kind!r}; expected chatml")
    content = found.read(row)
    if content.text is None and not any(m["role"] == "assistant" for m in content.messages):
        raise RowError("has no assistant turn, so there is nothing to learn from it")
    return found, content


def _read_chatml(row: Mapping[str, Any]) -> RowContent:
    messages = _list_of(row["messages"], "messages")
    return RowContent(_with_system(row, _checked(messages)), _tools(row))


def _read_conversations(row: Mapping[str, Any]) -> RowContent:
    key = "conversations" if row.get("conversations") is not None else "conversation"
    turns = _list_of(row[key], key)
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f", turn {number}"
        if not isinstance(turn, dict):
            raise RowError(f'is {kind_of(turn)}; expected {{"from": ..., "value": ...}}', place)
        if "from" in turn or "value" in turn:
            extra = _extra(turn, ("from", "value", "loss"))
            if turn.get("loss") is not None and not turn["loss"]:
                extra = ["loss", *extra]
            if extra:
                raise RowError(f"has {', '.join(extra)}; only from and value are known", place)
            turn = {"role": turn.get("from"), "content": turn.get("value")}
        messages.append(turn)
    return RowContent(_with_system(row, _checked(messages, "turn")), _tools(row))


def _read_alpaca(row: Mapping[str, Any]) -> RowContent:
    question = _text(row, "instruction")
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError(f'has {kind_of(given)} as "input"; expected text')
    if given and given.strip():
        question = f"{question}\n\n{given}" if question.strip() else given
    messages: list[Any] = []
    for number, pair in enumerate(row.get("history") or [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("is no pair of question and answer", f", history {number}")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    messages += _turn(question, _text(row, "output"))
    return RowContent(_with_system(row, _checked(messages)), _tools(row))


def _read_prompt(row: Mapping[str, Any]) -> RowContent:
    answer = "completion" if row.get("completion") is not None else "response"
    prompt, completion = row["prompt"], row[answer]
    if isinstance(prompt, list) and isinstance(completion, list):
        return RowContent(_with_system(row, _checked([*prompt, *completion])), _tools(row))
    turn = _turn(_text(row, "prompt"), _text(row, answer))
    return RowContent(_with_system(row, _checked(turn)), _tools(row))


def _read_question(row: Mapping[str, Any]) -> RowContent:
    question, answer = (
        next(key for key in group if row.get(key) is not None) for group in _QUESTION_KEYS
    )
    turn = _turn(_text(row, question), _text(row, answer))
    return RowContent(_with_system(row, _checked(turn)))


def _read_text(row: Mapping[str, Any]) -> RowContent:
    text = _text(row, "text")
    if not text.strip():
        raise RowError('has an empty "text"')
    _check_unicode(text, "")
    return RowContent(text=text)


_QUESTION_KEYS = (("question", "query", "ask"), ("answer", "response"))

# In this order: alpaca files often carry the templated text too, and chats their first prompt.
FORMATS = (
    Format("chatml", (("messages",),), _read_chatml),
    Format("conversations", (("conversations", "conversation"),), _read_conversations),
    Format("alpaca", (("instruction",), ("output",)), _read_alpaca),
    Format("prompt/completion", (("prompt",), ("completion", "response")), _read_prompt),
    Format("question/answer", _QUESTION_KEYS, _read_question),
    Format("text", (("text",),), _read_text),
)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f'has {kind_of(value)} as "{key}"; expected text')
    return value


def _list_of(value: Any, key: str) -> list[Any]:
    if isinstance(value, str):
        # CSV and Parquet files may hold it as JSON text.
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f'"{key}" is a string; expected an array') from None
    if not isinstance(value, list):
        raise RowError(f'"{key}" is {kind_of(value)}; expected an array')
    return value


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise RowError(f'has {kind_of(system)} as "system"; expected text')
    if messages and messages[0]["role"] == "system":
        raise RowError('has both a "system" key and a system turn; keep one')
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if not tools:
        return None
    tools = _list_of(tools, "tools")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("is no function with a name", f", tool {number}")
    return [drop_nothing(tool) for tool in tools] or None


def drop_nothing(value: Any) -> Any:
    """A copy without keys that hold null: Parquet files give every struct the keys of all."""
    if isinstance(value, dict):
        return {key: drop_nothing(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nothing(item) for item in value]
    return value


def _checked(messages: list[Any], word: str = "message") -> list[Message]:
    return [
        _check_message(message, f", {word} {number}")
        for number, message in enumerate(messages, start=1)
    ]


def _check_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f'is {kind_of(message)}; expected {{"role": ..., "content": ...}}', place)
    name = message.get("role")
    role = _ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"has the role {name!r}; expected one of: {', '.join(ROLES)}", place)
    if role == "function_call":
        call = {"tool_calls": _list_or_one(message.get("content"), place)}
        message, role = call, "assistant"
    # A key such as `weight` changes what is learned: dropping it would be wrong.
    known = _MESSAGE_KEYS[role]
    extra = _extra(message, ("role", "content", *known))
    if extra:
        expected = ", ".join(("role", "content", *known))
        raise RowError(f"has {', '.join(extra)}; of {role} messages {expected} are known", place)
    checked: Message = {"role": role, "content": _content(message, role, place)}
    for key in known:
        if message.get(key):
            checked[key] = message[key]
    if "tool_calls" in checked:
        checked["tool_calls"] = _calls(checked["tool_calls"], place)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(checked.get(key, ""), str):
            raise RowError(f"has {kind_of(checked[key])} as {key}; expected text", place)
    _check_unicode(json.dumps(checked, ensure_ascii=False), place)
    return checked


def _extra(message: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    # A weight of 0 says something; null, as Parquet fills keys up, and what is empty do not.
    nothing: tuple[Any, ...] = (None, "", [], {})
    return sorted(str(k) for k, value in message.items() if k not in known and value not in nothing)


def _content(message: Mapping[str, Any], role: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, list) and content:
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"has {kind_of(content)} as content; expected text", place)
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise RowError("is an empty assistant turn", place)
    return content


def _list_or_one(content: Any, place: str) -> list[Any]:
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError:
            raise RowError("is a function call that is not JSON", place) from None
    return content if isinstance(content, list) else [content]


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, which is what chat templates expect."""
    if not isinstance(calls, list):
        raise RowError(f"has {kind_of(calls)} as tool_calls; expected an array", place)
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("has a tool call without a function's name", place)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise RowError(f"calls {function['name']} with arguments that are no object", place)
        made: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": drop_nothing(arguments)},
        }
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        checked.append(made)
    return checked


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"holds half of a surrogate pair ({error.start})", place) from None
