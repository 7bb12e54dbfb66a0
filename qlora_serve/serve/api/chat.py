"""`POST /v1/chat/completions`."""

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response

from qlora_serve.serve.api.answers import ChatAnswer, whole_or_stream
from qlora_serve.serve.api.chat_body import ChatRequest
from qlora_serve.serve.api.chat_prompt import prepare_chat
from qlora_serve.serve.api.event_stream import json_text
from qlora_serve.serve.api.generation import (
    Gathered,
    StreamWriter,
    answer_stream,
    answer_whole,
    total_usage,
    usage_body,
)
from qlora_serve.serve.api.logprobs import chat_logprobs
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.api.tool_format import ToolFormat
from qlora_serve.serve.api.tool_parser import ToolParser, assistant_message, piece_delta
from qlora_serve.serve.api.trial import Recorder, choose, describe_chat
from qlora_serve.serve.engine.request import Delta, Finished, GenerationRequest, Usage

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    tags=["chat"],
    summary="Answer a chat",
    response_model=None,
    responses=whole_or_stream(ChatAnswer),
)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers with the base, or with the adapter that `adapter` or `model` names."""
    service: Service = request.app.state.service
    adapter, trial = choose(service, body)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    requests, form = await prepare_chat(service, body, answer_id, adapter)
    name = adapter.name if adapter else service.base_name
    answer = _Answer(service, body, requests, answer_id, name)
    if form is not None:
        answer.read_calls(form)
    recorder = None
    if trial is not None:
        describe = describe_chat(body, form)
        recorder = Recorder(service, trial, answer_id, requests, describe)
    if body.stream:
        return await answer_stream(service, requests, answer, recorder)
    return await answer_whole(request, service, requests, answer.whole, recorder)


class _Answer(StreamWriter):
    """The shape of an answer, whole or in chunks."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        requests: list[GenerationRequest],
        answer_id: str,
        model: str,
    ) -> None:
        self._texts = service.texts_of(requests[0].adapter)
        self._body = body
        self._requests = requests
        self._parsers: list[ToolParser] = []
        self._common = {"id": answer_id, "created": int(time.time()), "model": model}
        self._around = [self._split_chunk(index) for index in range(len(requests))]

    def read_calls(self, form: ToolFormat) -> None:
        """From now on, tool calls are read out of the text."""
        only_one = not self._body.parallel_tool_calls
        self._parsers = [ToolParser(form, only_one) for _ in self._requests]

    def whole(self, gathered: list[Gathered]) -> dict[str, Any]:
        """A `chat.completion`."""
        choices = []
        for index, one in enumerate(gathered):
            assert isinstance(one.ending, Finished)
            choices.append(
                {
                    "index": index,
                    "message": self._message(index, one.text),
                    "logprobs": self._logprobs(one.logprobs),
                    "finish_reason": self._reason(index, one.ending),
                }
            )
        usage = total_usage(self._requests, [one.ending for one in gathered])
        return {
            **self._common,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_body(usage),
        }

    def _message(self, index: int, text: str) -> dict[str, Any]:
        return assistant_message(text, self._parsers[index] if self._parsers else None)

    def _reason(self, index: int, ending: Finished) -> str:
        has_called = bool(self._parsers) and self._parsers[index].calls > 0
        return "tool_calls" if has_called and ending.reason == "stop" else ending.reason

    def head(self) -> Iterable[str]:
        """A chunk with the role for each choice."""
        for index in range(len(self._requests)):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, number: int, event: Delta | Finished) -> Iterable[str]:
        """A chunk for each event, and for each part of a tool call."""
        logprobs = None if isinstance(event, Finished) else self._logprobs(event.logprobs)
        if not self._parsers:
            if isinstance(event, Delta) and logprobs is None:
                before, behind = self._around[number]
                yield f"{before}{json_text(event.text)}{behind}"
            elif isinstance(event, Delta):
                yield self._chunk(number, {"content": event.text}, logprobs)
        else:
            parser = self._parsers[number]
            pieces = parser.feed(event.text) if isinstance(event, Delta) else parser.finish()
            deltas = [piece_delta(piece) for piece in pieces]
            if not deltas and logprobs is not None:
                deltas = [{}]  # tokens of a marker, or held back: their log-probabilities go out
            for delta in deltas:
                yield self._chunk(number, delta, logprobs)
                logprobs = None
        if isinstance(event, Finished):
            yield self._chunk(number, {}, reason=self._reason(number, event))

    def tail(self, usage: Usage) -> Iterable[str]:
        """The counts, when they were asked for, and the end."""
        if self._body.wants_usage:
            yield self._json([], usage=usage_body(usage))
        yield "[DONE]"

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        return chat_logprobs(self._texts, tokens) if self._body.logprobs else None

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None,
               reason: str | None = None) -> str:  # fmt: skip
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._json([choice])

    def _split_chunk(self, index: int) -> tuple[str, str]:
        """What stands before and behind the text of a chunk, which is all that changes in most."""
        before, _, behind = self._chunk(index, {"content": "TEXT"}).rpartition('"TEXT"')
        return before, behind

    def _json(self, choices: list[Any], **more: Any) -> str:
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": choices, **more}
        return json.dumps(chunk, ensure_ascii=False)
