"""`POST /v1/responses`, for text and function calls; nothing is stored."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response

from qlora_serve.serve.api.answers import ResponseAnswer, whole_or_stream
from qlora_serve.serve.api.chat_prompt import prepare_chat
from qlora_serve.serve.api.generation import (
    Gathered,
    StreamWriter,
    answer_stream,
    answer_whole,
)
from qlora_serve.serve.api.responses_body import ResponsesRequest
from qlora_serve.serve.api.responses_items import OutputItems
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.api.tool_format import ToolFormat
from qlora_serve.serve.api.tool_parser import Piece, ToolParser
from qlora_serve.serve.api.trial import Recorder, choose, describe_chat
from qlora_serve.serve.engine.request import Delta, Failed, Finished, Usage

router = APIRouter()


@router.post("/v1/responses", tags=["responses"], summary="Respond to an input",
             response_model=None, responses=whole_or_stream(ResponseAnswer))  # fmt: skip
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Responds with text or function calls. Nothing is stored: ids cannot be referred to later."""
    service: Service = request.app.state.service
    adapter, trial = choose(service, body)
    answer_id = f"resp_{uuid.uuid4().hex}"
    chat = body.as_chat()
    requests, form = await prepare_chat(service, chat, answer_id, adapter)
    answer = _Answer(body, answer_id, adapter.name if adapter else service.base_name, form)
    recorder = None
    if trial is not None:
        recorder = Recorder(service, trial, answer_id, requests, describe_chat(chat, form))
    if body.stream:
        return await answer_stream(service, requests, answer, recorder)
    return await answer_whole(request, service, requests, answer.whole, recorder)


class _Answer(StreamWriter):
    """The shape of a response, whole or as events."""

    def __init__(
        self, body: ResponsesRequest, answer_id: str, model: str, form: ToolFormat | None
    ) -> None:
        self._parser = ToolParser(form, not body.parallel_tool_calls) if form else None
        self._output = OutputItems()
        tools = [
            {"type": "function", "name": tool.name, "description": tool.description,
             "parameters": tool.parameters, "strict": tool.strict}
            for tool in body.tools
        ]  # fmt: skip
        text_format = body.text.format
        self._response: dict[str, Any] = {
            "id": answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "temperature": body.temperature,
            "text": {
                "format": text_format.model_dump(by_alias=True, exclude_none=True)
                if text_format
                else {"type": "text"}
            },
            "tool_choice": body.tool_choice
            if isinstance(body.tool_choice, str)
            else body.tool_choice.model_dump(),
            "tools": tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, gathered: list[Gathered]) -> dict[str, Any]:
        """A finished `response`."""
        ending = gathered[0].ending
        assert isinstance(ending, Finished)
        for _ in self._output.add(self._pieces(gathered[0].text)):
            pass
        for _ in self._finish(ending):
            pass
        return self._final(ending.usage)

    def head(self) -> Iterable[dict[str, str]]:
        """The response has been made and is being worked on."""
        for kind in ("response.created", "response.in_progress"):
            yield self._output.event(kind, response=self._response)

    def event(self, number: int, event: Delta | Finished) -> Iterable[dict[str, str]]:
        """Text and calls as they come."""
        if isinstance(event, Delta):
            yield from self._output.add(self._pieces(event.text))
        else:
            yield from self._finish(event)

    def failed(self, event: Failed) -> Iterable[dict[str, str]]:
        """The response as far as it came, with the error."""
        error = {"code": "server_error", "message": event.message}
        response = {**self._response, "status": "failed", "error": error}
        response["output"] = self._output.items
        yield self._output.event("response.failed", response=response)

    def tail(self, usage: Usage) -> Iterable[dict[str, str]]:
        """The whole response."""
        response = self._final(usage)
        yield self._output.event(f"response.{response['status']}", response=response)

    def _pieces(self, text: str) -> Iterable[Piece]:
        if self._parser is None:
            return [text] if text else []
        return self._parser.feed(text)

    def _finish(self, ending: Finished) -> Iterable[dict[str, str]]:
        if self._parser is not None:
            yield from self._output.add(self._parser.finish())
        is_complete = ending.reason == "stop"
        self._response["status"] = "completed" if is_complete else "incomplete"
        if not is_complete:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield from self._output.close(self._response["status"])

    def _final(self, usage: Usage) -> dict[str, Any]:
        return {
            **self._response,
            "output": self._output.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
