"""The load client: the same for every HTTP system, so that it favours none.

While answers arrive it only notes when each piece of a response was read; what the pieces mean is
worked out after the last one, so that the client takes little time from the server beside it.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from workload import BenchmarkError, Measurement


@dataclass
class HttpJob:
    """A request as it is sent."""

    body: dict[str, Any]
    delay: float = 0.0


@dataclass
class Response:
    """What was received, and when; all times are of `time.perf_counter`."""

    asked: int
    sent: float
    status: int = 0
    reads: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A parsed response."""

    sent: float
    times: list[float]
    """When each piece of text arrived: one a token, but for tokens without text of their own."""
    ended: float
    tokens: int


def measure(url: str, clients: list[list[HttpJob]]) -> Measurement:
    """Runs clients side by side, each sending its jobs one after the other.

    Args:
        url: of the API, up to `/v1`.
        clients: the jobs of each client; their bodies ask for a stream with usage.

    Raises:
        BenchmarkError: a request failed, or gave another number of tokens than was asked for.
    """
    start, responses = asyncio.run(_run(url, clients))
    answers = [parse(response) for response in responses]
    return Measurement(
        seconds=max(answer.ended for answer in answers) - start,
        tokens=sum(answer.tokens for answer in answers),
        ttfts=[answer.times[0] - answer.sent for answer in answers if answer.times],
        itls=[
            later - earlier
            for answer in answers
            for earlier, later in zip(answer.times, answer.times[1:], strict=False)
        ],
    )


async def _run(url: str, clients: list[list[HttpJob]]) -> tuple[float, list[Response]]:
    unlimited = httpx.Limits(max_connections=None)
    # No proxy of the environment: the servers are near.
    async with httpx.AsyncClient(timeout=None, limits=unlimited, trust_env=False) as http:
        start = time.perf_counter()
        try:
            done = await asyncio.gather(*(_client(http, url, jobs) for jobs in clients))
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise BenchmarkError(f"{url} does not answer: {reason}") from None
    return start, [response for responses in done for response in responses]


async def _client(http: httpx.AsyncClient, url: str, jobs: list[HttpJob]) -> list[Response]:
    responses = []
    for job in jobs:
        if job.delay:
            await asyncio.sleep(job.delay)
        record = Response(asked=job.body["max_tokens"], sent=time.perf_counter())
        request = http.stream("POST", f"{url}/chat/completions", json=job.body)
        async with request as response:
            record.status = response.status_code
            async for data in response.aiter_raw():
                record.reads.append((time.perf_counter(), data))
        responses.append(record)
    return responses


def parse(response: Response) -> Answer:
    """Reads a stream of OpenAI's chunks.

    Raises:
        BenchmarkError: it is an error, or not the number of tokens that was asked for.
    """
    if response.status != 200:
        text = b"".join(data for _, data in response.reads).decode(errors="replace")
        raise BenchmarkError(f"a request was refused with {response.status}: {text[:300]}")
    times: list[float] = []
    tokens = None
    for at, payload in _events(response.reads):
        if payload == b"[DONE]":
            continue
        chunk = json.loads(payload)
        if "error" in chunk:
            raise BenchmarkError(f"a request failed: {chunk['error']}")
        if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
            times.append(at)
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
    if tokens != response.asked:
        raise BenchmarkError(
            f"{tokens} tokens came where {response.asked} were asked for: "
            "the server must honour max_tokens, ignore_eos and stream_options.include_usage"
        )
    return Answer(response.sent, times, response.reads[-1][0], tokens)


def _events(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each server-sent event's data, with the time at which its end was read."""
    rest = b""
    for at, data in reads:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line.removeprefix(b"data:").strip()
