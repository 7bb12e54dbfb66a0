"""`POST /v1/chat/completions`."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

from qlora_serve.errors import RequestError
from qlora_serve.serve.api.errors import error_body
from qlora_serve.serve.api.schemas import ChatRequest
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.engine.request import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Usage,
)

router = APIRouter()


@router.post("/v1/chat/completions", tags=["chat"], summary="Answer a chat", response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers with the base, or with the adapter that `adapter` or `model` names."""
    service: Service = request.app.state.service
    adapter = service.choose(body.model, body.wanted_adapter, body.adapter_scale)
    tokens = None if adapter is None else adapter.tokens
    prompt = await service.tokenize_chat([m.as_template_input() for m in body.messages], tokens)
    generation = GenerationRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt=prompt,
        sampling=_sampling(body, len(prompt), service),
        adapter=adapter,
        tokens=tokens,
    )
    answer = _Answer(generation.request_id, adapter.name if adapter else service.base_name)
    if body.stream:
        return await _stream(service, generation, answer, body)
    async with service.generate(generation) as events:
        ending, text = await _collect(request, events)
    if ending is None:
        return Response(status_code=499)  # the client has gone; nobody reads this
    if isinstance(ending, Failed):
        return JSONResponse(error_body(ending.message, "server_error"), 500)
    return JSONResponse(answer.whole(text, ending))


def _sampling(body: ChatRequest, prompt_tokens: int, service: Service) -> Sampling:
    limits = service.engine.limits
    room = limits.longest - prompt_tokens
    if room <= 0:
        reason = limits.refusal(prompt_tokens, 1)
        raise RequestError(str(reason), param="messages")
    return Sampling(
        max_tokens=body.token_limit or room,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(body.stop),
        ignore_eos=body.ignore_eos,
    )


async def _collect(
    request: Request, events: AsyncIterator[Event]
) -> tuple[Finished | Failed | None, str]:
    """Gathers a whole answer; the ending is None when the client went away first."""

    async def gather() -> tuple[Finished | Failed | None, str]:
        pieces: list[str] = []
        async for event in events:
            if not isinstance(event, Delta):
                return event, "".join(pieces)
            pieces.append(event.text)
        return None, ""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gathering, leaving = asyncio.create_task(gather()), asyncio.create_task(gone())
    try:
        await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return gathering.result() if gathering.done() else (None, "")
    finally:
        for task in (gathering, leaving):
            task.cancel()
        await asyncio.gather(gathering, leaving, return_exceptions=True)


async def _stream(
    service: Service, generation: GenerationRequest, answer: "_Answer", body: ChatRequest
) -> Response:
    # Entered before the first byte is sent, so that a refusal is still a plain 400.
    running = service.generate(generation)
    events = await running.__aenter__()
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def chunks() -> AsyncIterator[str]:
        try:
            yield answer.chunk({"role": "assistant", "content": ""})
            async for event in events:
                if isinstance(event, Delta):
                    yield answer.chunk({"content": event.text})
                elif isinstance(event, Failed):
                    yield json.dumps(error_body(event.message, "server_error"))
                    return
                else:
                    yield answer.chunk({}, event.reason)
                    if with_usage:
                        yield answer.usage_chunk(event.usage)
            yield "[DONE]"
        finally:
            await running.__aexit__(None, None, None)

    return EventSourceResponse(chunks(), sep="\n")


class _Answer:
    """The shape of an answer, whole or in chunks."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._common = {"id": answer_id, "created": int(time.time()), "model": model}

    def whole(self, text: str, ending: Finished) -> dict[str, Any]:
        """A `chat.completion`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": ending.reason,
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(ending.usage),
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        """A `chat.completion.chunk`, as JSON."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return json.dumps(
            {**self._common, "object": "chat.completion.chunk", "choices": [choice]},
            ensure_ascii=False,
        )

    def usage_chunk(self, usage: Usage) -> str:
        """The chunk without choices that carries the counts."""
        return json.dumps(
            {
                **self._common,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": _usage(usage),
            }
        )


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
