"""`POST /v1/completions`."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qlora_serve.serve.api.answers import TextAnswer, whole_or_stream
from qlora_serve.serve.api.completion_body import CompletionRequest
from qlora_serve.serve.api.event_stream import EventStream, json_text
from qlora_serve.serve.api.generation import (
    Gathered,
    StreamWriter,
    answer_stream,
    answer_whole,
    check_caps,
    make_requests,
    total_usage,
    until_gone,
    usage_body,
)
from qlora_serve.serve.api.logprobs import completion_logprobs, joined_logprobs
from qlora_serve.serve.api.prompt_logprobs import prompt_logprobs
from qlora_serve.serve.api.service import Service, own_tokens
from qlora_serve.serve.api.structured import structured_guide
from qlora_serve.serve.api.token_text import TokenTexts
from qlora_serve.serve.api.trial import Described, Recorder, choose
from qlora_serve.serve.engine.guide import Guide
from qlora_serve.serve.engine.request import (
    Delta,
    Finished,
    GenerationRequest,
    TokenLogprobs,
    Usage,
)
from qlora_serve.serve.engine.slots import AdapterSelection

router = APIRouter()


@router.post("/v1/completions", tags=["completions"], summary="Continue a text",
             response_model=None, responses=whole_or_stream(TextAnswer))  # fmt: skip
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues texts or tokens with the base, or with the adapter that is named."""
    service: Service = request.app.state.service
    adapter, trial = choose(service, body)
    each = max(body.n, body.best_of or 1)
    check_caps(service, body, len(body.prompts), each)
    prompts = [await _tokens(service, prompt, adapter) for prompt in body.prompts]
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    requests = make_requests(
        service,
        body,
        answer_id,
        prompts,
        each,
        adapter=adapter,
        tokens=own_tokens(adapter),
        guide=await _guide(service, body, adapter),
    )
    echoes = [await _text(service, p, adapter) if body.echo else "" for p in body.prompts]
    name = adapter.name if adapter else service.base_name
    answer = _Answer(service.texts_of(adapter), body, answer_id, name)
    answer.requests, answer.echoes = requests, echoes
    if body.echo and body.logprobs is not None:
        looking = prompt_logprobs(service, requests[::each], body.logprobs, answer.texts)
        found = await until_gone(request, looking)
        if found is None:
            return Response(status_code=499)  # the client has gone; nobody reads this
        answer.echoed = found
    if body.max_tokens == 0:
        return _prompts_alone(answer, body)
    recorder = None
    if trial is not None:
        texts = [await _text(service, prompt, adapter) for prompt in body.prompts]
        describe = partial(answer.described, texts)
        recorder = Recorder(service, trial, answer_id, requests, describe)
    if body.stream:
        return await answer_stream(service, requests, answer, recorder)
    return await answer_whole(request, service, requests, answer.whole, recorder)


def _prompts_alone(answer: "_Answer", body: CompletionRequest) -> Response:
    """The answer to `max_tokens=0`: nothing is generated."""
    endings = [Finished("length", Usage(len(one.prompt), 0)) for one in answer.requests]
    if not body.stream:
        return JSONResponse(answer.whole([Gathered(ending=ending) for ending in endings]))
    usage = total_usage(answer.requests, endings)
    ends = [chunk for number, end in enumerate(endings) for chunk in answer.event(number, end)]

    async def events() -> AsyncGenerator[list[str], None]:
        yield [*answer.head(), *ends, *answer.tail(usage)]

    return EventStream(events())


async def _guide(
    service: Service, body: CompletionRequest, adapter: AdapterSelection | None
) -> Guide | None:
    if body.structured_outputs is None:
        return None
    return await structured_guide(service.guides_of(adapter), body.structured_outputs)


async def _tokens(
    service: Service, prompt: str | list[int], adapter: AdapterSelection | None
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await service.tokenize_text(prompt, tokens=own_tokens(adapter))
    service.check_token_ids(prompt, "prompt", adapter)
    return tuple(prompt)


async def _text(service: Service, prompt: str | list[int], adapter: AdapterSelection | None) -> str:
    return prompt if isinstance(prompt, str) else await service.detokenize(prompt, adapter)


class _Answer(StreamWriter):
    """The shape of an answer, whole or in chunks."""

    def __init__(self, texts: TokenTexts, body: CompletionRequest, answer_id: str, model: str):
        self.texts = texts
        self._body = body
        self.requests: list[GenerationRequest] = []
        self.echoes: list[str] = []
        self._around: dict[int, tuple[str, str]] = {}
        self.echoed: list[dict[str, Any]] = []
        """The log-probabilities of each prompt, where they belong to the answer."""
        self._common = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, gathered: list[Gathered]) -> dict[str, Any]:
        """A `text_completion`."""
        choices: list[dict[str, Any]] = []
        for prompt, number in self._kept(gathered):
            one = gathered[number]
            assert isinstance(one.ending, Finished)
            logprobs = self._logprobs(prompt, one.logprobs, one.offsets)
            if self.echoed:
                logprobs = joined_logprobs(self.echoed[prompt], logprobs)
            choices.append(
                {
                    "index": len(choices),
                    "text": self.echoes[prompt] + one.text,
                    "logprobs": logprobs,
                    "finish_reason": one.ending.reason,
                }
            )
        usage = total_usage(self.requests, [one.ending for one in gathered])
        return {**self._common, "choices": choices, "usage": usage_body(usage)}

    def _kept(self, gathered: list[Gathered]) -> Iterable[tuple[int, int]]:
        """The prompt's and the request's number of each choice: of `best_of` only the best."""
        each = len(gathered) // len(self.echoes)
        for prompt in range(len(self.echoes)):
            numbers = list(range(prompt * each, (prompt + 1) * each))
            if each > self._body.n:
                numbers.sort(key=lambda number: _mean_logprob(gathered[number]), reverse=True)
            for number in numbers[: self._body.n]:
                yield prompt, number

    def described(self, prompts: list[str], gathered: list[Gathered]) -> Iterable[Described]:
        """How the choices are kept for feedback."""
        for prompt, number in self._kept(gathered):
            yield {"text": prompts[prompt]}, {"text": gathered[number].text}, number

    def head(self) -> Iterable[str]:
        """With `echo`, a chunk with the prompt for each choice."""
        for number in range(len(self.requests) if self._body.echo else 0):
            prompt = number // self._body.n
            logprobs = self.echoed[prompt] if self.echoed else None
            yield self._chunk(number, self.echoes[prompt], logprobs)

    def event(self, number: int, event: Delta | Finished) -> Iterable[str]:
        """A chunk for each event."""
        if isinstance(event, Finished):
            yield self._chunk(number, "", reason=event.reason)
            return
        if self._body.logprobs is None:
            before, behind = self._split_chunk(number)
            yield f"{before}{json_text(event.text)}{behind}"
            return
        logprobs = self._logprobs(number // self._body.n, event.logprobs, event.offsets)
        yield self._chunk(number, event.text, logprobs)

    def _split_chunk(self, number: int) -> tuple[str, str]:
        """What stands before and behind the text of a chunk, which is all that changes in most."""
        if number not in self._around:
            before, _, behind = self._chunk(number, "TEXT").rpartition('"TEXT"')
            self._around[number] = before, behind
        return self._around[number]

    def _logprobs(
        self, prompt: int, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> Any:
        if self._body.logprobs is None:
            return None
        shift = len(self.echoes[prompt])  # where the answer begins in the text
        return completion_logprobs(self.texts, tokens, [shift + offset for offset in offsets])

    def tail(self, usage: Usage) -> Iterable[str]:
        """The counts, when they were asked for, and the end."""
        if self._body.wants_usage:
            yield json.dumps({**self._common, "choices": [], "usage": usage_body(usage)})
        yield "[DONE]"

    def _chunk(self, index: int, text: str, logprobs: Any = None, reason: Any = None) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return json.dumps({**self._common, "choices": [choice]}, ensure_ascii=False)


def _mean_logprob(one: Gathered) -> float:
    if not one.logprobs:
        return float("-inf")
    return sum(token.logprob for token in one.logprobs) / len(one.logprobs)
