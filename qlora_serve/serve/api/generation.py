"""From a checked body to running requests, and from their events to whole answers or streams."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from qlora_serve.errors import RequestError, RequestTimeoutError
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.errors import error_body
from qlora_serve.serve.api.event_stream import Data, EventStream
from qlora_serve.serve.api.schemas import SamplingBody
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.engine.request import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    TokenLogprobs,
    Usage,
)

# Odd and large, so that the seeds of one request's choices do not meet those of the next seed.
_SEED_STEP = 0x9E3779B97F4A7C15


def check_caps(service: Service, body: SamplingBody, prompts: int, choices_each: int) -> None:
    """Refuses a body that asks for more than the server's caps.

    Raises:
        RequestError: naming the field.
    """
    limits = service.limits
    limits.check(prompts * choices_each, limits.choices, "n", "answers in one request")
    limits.check(len(body.stop_texts), limits.stop_texts, "stop", "texts")
    longest = max(map(len, body.stop_texts), default=0)
    limits.check(longest, limits.stop_length, "stop", "characters in one text")
    limits.check(len(body.logit_bias), limits.logit_biases, "logit_bias", "entries")
    service.check_token_ids(map(int, body.logit_bias), "logit_bias")
    if limits.output_tokens is not None and body.asked_tokens is not None:
        limits.check(body.asked_tokens, limits.output_tokens, "max_tokens", "tokens")


def make_requests(
    service: Service,
    body: SamplingBody,
    answer_id: str,
    prompts: Sequence[tuple[int, ...]],
    choices_each: int,
    **same: Any,
) -> list[GenerationRequest]:
    """One request for each choice of each prompt, the choices of a prompt side by side.

    Args:
        service: that will run them.
        body: what was asked for.
        answer_id: the answer's id, from which the requests' own are made.
        prompts: token ids of each.
        choices_each: answers to each prompt.
        same: other fields of every `GenerationRequest`, such as its adapter.

    Raises:
        RequestError: a prompt leaves no room for an answer.
    """
    requests: list[GenerationRequest] = []
    same = {"client": current_caller().id} | same
    for prompt in prompts:
        sampling = _sampling(service, body, len(prompt))
        for number in range(choices_each):
            own = dict(sampling, seed=_seed_of_choice(body.seed, number))
            requests.append(
                GenerationRequest(f"{answer_id}-{len(requests)}", prompt, Sampling(**own), **same)
            )
    return requests


def _seed_of_choice(seed: int | None, number: int) -> int | None:
    """The first choice has the seed itself, so that `n` does not change it."""
    if seed is None or number == 0:
        return seed
    return (seed + number * _SEED_STEP) % 2**63


def _sampling(service: Service, body: SamplingBody, prompt_tokens: int) -> dict[str, Any]:
    limits = service.engine.limits
    room = limits.longest - prompt_tokens
    if room <= 0:
        raise RequestError(str(limits.refusal(prompt_tokens, 1)), param="messages")
    if service.limits.output_tokens is not None:
        room = min(room, service.limits.output_tokens)
    return {
        "max_tokens": body.asked_tokens or min(body.token_limit or room, room),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": tuple((int(token), bias) for token, bias in body.logit_bias.items()),
        "stop": body.stop_texts,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "logprobs": body.reported_logprobs,
    }


@dataclass
class Gathered:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: Finished | Failed | None = None

    def add(self, event: Event) -> None:
        """Takes the next event."""
        if not isinstance(event, Delta):
            self.ending = event
            return
        self.text += event.text
        self.token_ids += event.token_ids
        self.offsets += event.offsets
        self.logprobs += event.logprobs


class Watcher(Protocol):
    """Somebody who follows an answer without changing it, such as `trial.Recorder`."""

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's head shall say."""

    def event(self, number: int, event: Event) -> None:
        """What happened to request `number`."""


async def answer_whole(
    request: Request,
    service: Service,
    requests: Sequence[GenerationRequest],
    write: Callable[[list[Gathered]], dict[str, Any]],
    watcher: Watcher | None = None,
) -> Response:
    """Runs the requests and answers with one JSON object.

    If the client goes away first, they are aborted.
    """
    async with service.generate_all(requests) as events:
        gathered = await until_gone(request, _gather(events, len(requests), watcher))
    if gathered is None:
        return Response(status_code=499)  # the client has gone; nobody reads this
    for one in gathered:
        if isinstance(one.ending, Failed):
            status = 500 if service.engine.is_alive else 503
            return JSONResponse(error_body(one.ending.message, "server_error"), status)
    return JSONResponse(write(gathered), headers=watcher.headers if watcher else None)


async def _gather(
    batches: AsyncIterator[list[tuple[int, Event]]], count: int, watcher: Watcher | None
) -> list[Gathered]:
    gathered = [Gathered() for _ in range(count)]
    async for batch in batches:
        for number, event in batch:
            gathered[number].add(event)
            if watcher is not None:
                watcher.event(number, event)
            if isinstance(event, Failed):
                return gathered  # leaving aborts the others
    return gathered


async def until_gone(request: Request, work: Any) -> Any:
    """The result of `work`, a coroutine, or None when the client went away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class StreamWriter:
    """How a stream of events is written; each method gives the data of SSE events."""

    def head(self) -> Iterable[Data]:
        """Before anything was generated."""
        return ()

    def event(self, number: int, event: Delta | Finished) -> Iterable[Data]:
        """What one event of choice `number` becomes."""
        raise NotImplementedError

    def failed(self, event: Failed) -> Iterable[Data]:
        """The last events, when something broke."""
        return [json.dumps(error_body(event.message, "server_error"))]

    def tail(self, usage: Usage) -> Iterable[Data]:
        """After every choice has ended."""
        return ["[DONE]"]


async def answer_stream(
    service: Service,
    requests: Sequence[GenerationRequest],
    writer: StreamWriter,
    watcher: Watcher | None = None,
) -> Response:
    """Runs the requests and answers with server-sent events.

    If the client goes away, they are aborted.
    """
    # Entered before the first byte is sent, so that a refusal is still a plain 400.
    running = service.generate_all(requests)
    batches = await running.__aenter__()

    async def events() -> AsyncGenerator[Iterable[Data], None]:
        endings: dict[int, Finished] = {}
        try:
            yield writer.head()
            async for batch in batches:
                ready: list[Data] = []
                for number, event in batch:
                    if watcher is not None:
                        watcher.event(number, event)
                    if isinstance(event, Failed):
                        yield [*ready, *writer.failed(event)]
                        return
                    if isinstance(event, Finished):
                        endings[number] = event
                    ready += writer.event(number, event)
                yield ready
            yield writer.tail(total_usage(requests, [endings[n] for n in range(len(requests))]))
        except RequestTimeoutError as error:  # after the first byte, errors are events
            yield writer.failed(Failed(str(error), Usage(0, 0)))
        finally:
            await running.__aexit__(None, None, None)

    return EventStream(events(), watcher.headers if watcher is not None else None)


def total_usage(
    requests: Sequence[GenerationRequest], endings: Iterable[Finished | Failed | None]
) -> Usage:
    """Tokens of all choices together; a prompt that several choices share counts once.

    Args:
        requests: all of them.
        endings: of each request, in the same order.
    """
    prompts: dict[int, Usage] = {}
    completion = 0
    for request, ending in zip(requests, endings, strict=True):
        if ending is None:
            continue
        completion += ending.usage.completion_tokens
        # The first choice is the one for which the prompt was computed, or not.
        prompts.setdefault(id(request.prompt), ending.usage)
    prompt = sum(usage.prompt_tokens for usage in prompts.values())
    return Usage(prompt, completion, sum(usage.cached_tokens for usage in prompts.values()))


def usage_body(usage: Usage) -> dict[str, Any]:
    """The counts in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
