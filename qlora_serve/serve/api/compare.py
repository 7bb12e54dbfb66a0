"""`POST /v1/compare`: one question, many answers side by side."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from qlora_serve.errors import EngineStoppedError, RequestTimeoutError
from qlora_serve.serve.api.access import require_scope
from qlora_serve.serve.api.answers import CompareAnswer, whole_or_stream
from qlora_serve.serve.api.chat_prompt import prepare_chat
from qlora_serve.serve.api.compare_body import CompareRequest, as_variant
from qlora_serve.serve.api.comparison import Comparison, Contender
from qlora_serve.serve.api.errors import error_body
from qlora_serve.serve.api.event_stream import EventStream
from qlora_serve.serve.api.generation import until_gone
from qlora_serve.serve.api.service import Service

router = APIRouter()


@router.post(
    "/v1/compare",
    tags=["compare"],
    summary="Ask base and adapters the same",
    response_model=None,
    responses=whole_or_stream(CompareAnswer),
    dependencies=[Depends(require_scope("infer"))],
)
async def compare(body: CompareRequest, request: Request) -> Response:
    """Answers with every variant in one batch, and says how far each adapter is from the base."""
    service: Service = request.app.state.service
    comparison = await _prepare(service, body)
    if body.stream:
        return await _stream(comparison)
    async with comparison.run() as events:
        whole = await until_gone(request, _gather(comparison, events))
    if whole is None:
        return Response(status_code=499)  # the client has gone; nobody reads this
    if not service.engine.is_alive:
        raise EngineStoppedError("the engine stopped while it was answering")
    return JSONResponse(whole)


async def _prepare(service: Service, body: CompareRequest) -> Comparison:
    variants = [as_variant(given) for given in body.variants]
    service.limits.check(len(variants), service.limits.variants, "variants", "variants")
    repeats = sum(variant.repeats for variant in variants)
    service.limits.check(repeats, service.limits.choices, "variants", "answers in one request")
    answer_id = f"cmp-{uuid.uuid4().hex}"
    contenders: list[Contender] = []
    for number, variant in enumerate(variants):
        chat = body.chat_of(variant)
        adapter = service.choose(chat.model, chat.wanted_adapter, chat.adapter_scale)
        requests, _ = await prepare_chat(service, chat, f"{answer_id}-{number}", adapter)
        texts = service.texts_of(adapter)
        asked = {"messages": [message.as_template_input() for message in chat.messages]}
        contenders += [
            Contender(len(contenders) + repeat, variant.label, repeat, one, texts, prompt=asked)
            for repeat, one in enumerate(requests)
        ]
    return Comparison(service, answer_id, contenders, body.divergence)


async def _gather(comparison: Comparison, events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    async for _ in events:
        pass
    return {
        "id": comparison.id,
        "object": "comparison",
        "created": int(time.time()),
        "answers": [contender.whole(comparison.names) for contender in comparison.contenders],
        "usage": comparison.usage(),
    }


async def _stream(comparison: Comparison) -> Response:
    # Entered before the first byte is sent, so that a refusal is still a plain 400.
    running = comparison.run()
    events = await running.__aenter__()

    async def written() -> AsyncGenerator[list[str], None]:
        try:
            yield [_json(comparison.start())]
            async with aclosing(events) as happening:
                async for event in happening:
                    yield [_json(event)]
            yield [_json({"type": "done", "usage": comparison.usage()}), "[DONE]"]
        except RequestTimeoutError as error:  # after the first byte, errors are events
            yield [_json(error_body(str(error), "server_error"))]
        finally:
            await running.__aexit__(None, None, None)

    return EventStream(written())


def _json(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False)
