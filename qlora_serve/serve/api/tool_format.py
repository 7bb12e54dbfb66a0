"""How model families write tool calls, and the grammars that hold them to it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_serve.errors import RequestError
from qlora_serve.serve.api.chat_body import ChatRequest, NamedToolChoice, Tool
from qlora_serve.serve.engine.guide import JSON_SPACE


@dataclass(frozen=True)
class ToolFormat:
    """One family's way of writing calls."""

    name: str
    opening: str
    """What begins a call, or a list of calls; empty when the call itself begins the answer."""
    closing: str
    """What ends a call; empty when nothing does."""
    arguments_key: str
    """The key beside `name`."""
    is_list: bool
    """Whether the calls are one JSON list."""
    sign: str
    """Text by which a chat template of this family is known."""
    separator: str = ""
    """What stands between a call's name and its arguments, where the name is not part of the
    JSON."""
    id_mark: str = ""
    """What stands between the name and the call's id, in templates that write one."""


_HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments", False, "<tool_call>")
_MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", True, "[TOOL_CALLS]")
# Mistral's from version 11 on: the name, then the arguments; in between, for a while, an id.
_MISTRAL_NAMED = ToolFormat(
    "mistral-named", "[TOOL_CALLS]", "", "", False, "[ARGS]", "[ARGS]", "[CALL_ID]"
)
_LLAMA = ToolFormat(
    "llama3", "", "", "parameters", False, '"parameters": dictionary of argument name'
)
_FORMATS = (_HERMES, _MISTRAL_NAMED, _MISTRAL, _LLAMA)
LLAMA_TAG = "<|python_tag|>"
"""Llama may write this before a call."""
# Templates of formats that share a sign with one of ours: Qwen3-Coder's XML.
_OTHER_SIGNS = ("<function=",)


def tool_format(tokenizer: Any) -> ToolFormat | None:
    """The format that the tokenizer's chat template teaches; None for one that we cannot read."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default", ""))
    template = str(template)
    if "tools" not in template or any(sign in template for sign in _OTHER_SIGNS):
        return None
    # Templates quote inside of strings in either way.
    plain = template.replace('\\"', '"')
    return next((f for f in _FORMATS if f.sign in plain), None)


def need_tool_format(tokenizer: Any) -> ToolFormat:
    """Like `tool_format`.

    Raises:
        RequestError: this base's template does not teach a format that we know.
    """
    found = tool_format(tokenizer)
    if found is None:
        raise RequestError(
            "tools are not supported by this base: its chat template has none of the formats that "
            "this server reads (Hermes/Qwen <tool_call>, Mistral [TOOL_CALLS] with a list or with "
            "[ARGS], Llama 3 JSON)",
            param="tools",
        )
    return found


def visible_tokens(form: ToolFormat, tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that must be part of the text, because the format is read from them."""
    markers = [form.opening, form.closing, form.separator, form.id_mark]
    if form is _LLAMA:
        markers = [LLAMA_TAG]
    ids = [_token_id(tokenizer, marker) for marker in markers if marker]
    return tuple(token for token in ids if token is not None)


def tool_grammar(form: ToolFormat, tokenizer: Any, body: ChatRequest) -> str | None:
    """The Lark grammar for the calls that a body asks for; None leaves the model free.

    `required` and a named function allow nothing but calls. `auto` allows any text, and what looks
    like a call must be one where a function is `strict`.

    Raises:
        RequestError: a strict function with a format whose calls cannot be told from text.
    """
    chosen = body.tool_choice
    tools = body.active_tools
    if isinstance(chosen, NamedToolChoice):
        tools = [tool for tool in tools if tool.function.name == chosen.function.name]
    is_forced = chosen not in (None, "auto")
    if not is_forced and not any(tool.function.strict for tool in tools):
        return None
    if not is_forced and not form.opening:
        raise RequestError(
            "tools: strict functions need tool_choice=required or a named function with this "
            "base, whose format does not mark where a call begins",
            param="tools",
        )
    several = body.parallel_tool_calls and not isinstance(chosen, NamedToolChoice)
    return _grammar(form, tokenizer, tools, several, is_forced)


def _grammar(
    form: ToolFormat, tokenizer: Any, tools: Sequence[Tool], several: bool, is_forced: bool
) -> str:
    opening, closing = (_terminal(tokenizer, text) for text in (form.opening, form.closing))
    is_free_text_marker = opening.startswith('"') and not is_forced
    if is_free_text_marker:  # the marker is spelled out: the text before it ends where it does
        opening = "marked"
    if form.separator:
        calls = f"{opening} one"
    elif form.is_list:
        calls = f'{opening} "[" one (", " one)* "]"' if several else f'{opening} "[" one "]"'
    elif form.opening:
        calls = f'{opening} "\\n" one "\\n" {closing}'
    else:
        calls = "one"
    rules = [f"call: {calls}"]
    if not is_forced:
        rules.append(r"TEXT: /(.|\n)*/")
        if is_free_text_marker:
            rules += ["start: call* TEXT", f"marked[lazy]: TEXT {json.dumps(form.opening)}"]
        else:
            rules.append("start: (TEXT call)* TEXT")
    elif several and form.closing:
        rules.append(r'start: call ("\n" call)*')
    elif several and form.separator:
        rules.append("start: call+")
    else:
        rules.append("start: call")
    rules.append("one: " + " | ".join(f"one_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        schema = _call_schema(form, tool, keep_parameters=is_forced or tool.function.strict)
        name = ""
        if form.separator:
            separator = _terminal(tokenizer, form.separator)
            name = f"{json.dumps(tool.function.name)} {separator} "
        rules.append(f"one_{number}: {name}%json {json.dumps(schema)}")
    return "\n".join(rules)


def _call_schema(form: ToolFormat, tool: Tool, keep_parameters: bool) -> dict[str, Any]:
    parameters = tool.function.parameters if keep_parameters else {"type": "object"}
    for reference in re.findall(r'"\$ref": "([^"]*)"', json.dumps(parameters)):
        if not reference.startswith(("#/$defs/", "#/definitions/")):
            raise RequestError(
                f"tools: {tool.function.name}: references may only point into $defs, not to "
                f"{reference!r}",
                param="tools",
            )
    space = {"x-guidance": {"whitespace_pattern": JSON_SPACE}}
    if form.separator:
        return parameters | space
    properties = {"name": {"const": tool.function.name}, form.arguments_key: parameters}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **space,
    }
    # References in the parameters point to their own root, which is no longer the schema's.
    for key in ("$defs", "definitions"):
        if isinstance(parameters.get(key), dict):
            schema[key] = parameters[key]
    return schema


def _terminal(tokenizer: Any, text: str) -> str:
    """A marker in Lark: its own token where the vocabulary has one, else its text."""
    token = _token_id(tokenizer, text) if text else None
    return json.dumps(text) if token is None else f"<[{token}]>"


def _token_id(tokenizer: Any, text: str) -> int | None:
    found = tokenizer.get_added_vocab().get(text)
    return None if found is None else int(found)
