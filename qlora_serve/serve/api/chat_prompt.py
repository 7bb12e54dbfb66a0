"""From the body of a chat to the requests that answer it."""

from typing import Any

from qlora_serve.serve.api.chat_body import ChatRequest
from qlora_serve.serve.api.generation import check_caps, make_requests
from qlora_serve.serve.api.service import Service, own_tokens
from qlora_serve.serve.api.structured import structured_guide
from qlora_serve.serve.api.tool_format import (
    ToolFormat,
    need_tool_format,
    tool_grammar,
    visible_tokens,
)
from qlora_serve.serve.engine.guide import Guide
from qlora_serve.serve.engine.request import GenerationRequest
from qlora_serve.serve.engine.slots import AdapterSelection


async def prepare_chat(
    service: Service, body: ChatRequest, answer_id: str, adapter: AdapterSelection | None
) -> tuple[list[GenerationRequest], ToolFormat | None]:
    """One request for each choice, and the format of tool calls where there can be some.

    Raises:
        RequestError: a cap, the template, a grammar or the context's length stands against it.
    """
    check_caps(service, body, 1, body.n)
    service.limits.check(len(body.messages), service.limits.messages, "messages", "messages")
    service.limits.check(len(body.tools), service.limits.tools, "tools", "functions")
    tokens = own_tokens(adapter)
    tokenizer = (tokens or service.base).tokenizer
    form = _tool_format(tokenizer, body)
    guide = await _guide(service, body, form, adapter)
    prompt = await service.tokenize_chat(
        [message.as_template_input() for message in body.messages],
        [tool.as_template_input() for tool in body.active_tools],
        tokens=tokens,
    )
    requests = make_requests(
        service,
        body,
        answer_id,
        [prompt],
        body.n,
        adapter=adapter,
        tokens=tokens,
        guide=guide,
        visible_ids=visible_tokens(form, tokenizer) if form else (),
    )
    return requests, form


def _tool_format(tokenizer: Any, body: ChatRequest) -> ToolFormat | None:
    """The format of calls in the answer; None when there can be none."""
    has_history = any(m.tool_calls or m.role == "tool" for m in body.messages)
    if not (body.active_tools or has_history):
        return None
    form = need_tool_format(tokenizer)
    return form if body.active_tools else None


async def _guide(
    service: Service,
    body: ChatRequest,
    form: ToolFormat | None,
    adapter: AdapterSelection | None,
) -> Guide | None:
    if form is not None:
        grammar = tool_grammar(form, service.base.tokenizer, body)
        return await service.guides_of(adapter).get("lark", grammar, "tools") if grammar else None
    wanted, where = body.response_format, "response_format"
    if (wanted is None or wanted.type == "text") and body.structured_outputs is None:
        return None
    guides = service.guides_of(adapter)
    if wanted is None or wanted.type == "text":
        return await structured_guide(guides, body.structured_outputs)
    if wanted.type == "json_object":
        return await guides.get("json_schema", {"type": "object"}, where)
    if wanted.json_schema is not None:
        return await guides.get("json_schema", wanted.json_schema.json_schema, where)
    if wanted.regex is not None:
        return await guides.get("regex", wanted.regex, where)
    return await guides.get("grammar", wanted.grammar, where)
