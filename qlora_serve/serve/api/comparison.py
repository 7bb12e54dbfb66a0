"""One question's answers on their way: what each variant says, and how far it is from the base."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from qlora_serve.errors import EngineStoppedError, QloraServeError
from qlora_serve.serve.api.generation import Gathered, total_usage, usage_body
from qlora_serve.serve.api.logprobs import named_logprob
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.api.token_text import TokenTexts
from qlora_serve.serve.api.trial import answered, key_id
from qlora_serve.serve.engine.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Score,
)
from qlora_serve.serve.engine.slots import AdapterSelection


@dataclass
class Contender:
    """One answer of one variant."""

    index: int
    """Its place among all answers."""
    variant: str
    """The variant's name."""
    repeat: int
    """Which of the variant's answers."""
    request: GenerationRequest
    """That generates it."""
    texts: TokenTexts
    """What its tokens say."""
    gathered: Gathered = field(default_factory=Gathered)
    first_seconds: float | None = None
    """From the beginning to the first text."""
    seconds: float | None = None
    """From the beginning to the end."""
    score: Score | None = None
    """Filled when the answer was compared with the base's distribution."""
    score_error: str | None = None
    """Why it was not, where it should have been."""
    prompt: dict[str, Any] = field(default_factory=dict)
    """What it was asked, as feedback keeps it."""

    @property
    def tag(self) -> dict[str, Any]:
        """What every event of it begins with."""
        return {"index": self.index, "variant": self.variant, "repeat": self.repeat}

    def tokens(self, logprobs: Sequence[Any]) -> list[dict[str, Any]]:
        """Tokens with their text and log-probability."""
        return [
            {"id": one.token_id, **named_logprob(self.texts, one.token_id, one.logprob)}
            for one in logprobs
        ]

    def summary(self, model: Callable[[AdapterSelection | None], str]) -> dict[str, Any]:
        """How it went, without the text."""
        ending, logprobs = self.gathered.ending, self.gathered.logprobs
        assert isinstance(ending, Finished | Failed)
        failed = isinstance(ending, Failed)
        return {
            **self.tag,
            "id": self.request.request_id,
            "model": model(self.request.adapter),
            "finish_reason": "error" if isinstance(ending, Failed) else ending.reason,
            "error": ending.message if isinstance(ending, Failed) else None,
            "usage": usage_body(ending.usage),
            "ttft_seconds": self.first_seconds,
            "seconds": self.seconds,
            "mean_logprob": fmean(t.logprob for t in logprobs) if logprobs and not failed else None,
        }

    def divergence(self) -> dict[str, Any] | None:
        """How far its distributions are from the base's; None where there is nothing to say."""
        if self.score_error is not None:
            return {"error": self.score_error, "mean": None, "max": None, "tokens": []}
        if self.score is None:
            return None
        found = zip(self.score.divergences, self.score.logprobs, self.score.base_logprobs,
                    strict=True)  # fmt: skip
        return {
            "error": None,
            "mean": fmean(self.score.divergences),
            "max": max(self.score.divergences),
            "tokens": [
                {"divergence": divergence, "logprob": own, "base_logprob": base}
                for divergence, own, base in found
            ],
        }

    def whole(self, model: Callable[[AdapterSelection | None], str]) -> dict[str, Any]:
        """The answer with all that is known of it."""
        return {
            **self.summary(model),
            "text": self.gathered.text,
            "tokens": self.tokens(self.gathered.logprobs),
            "divergence": self.divergence(),
        }


class Comparison:
    """Runs all answers in one batch, and scores each as soon as it is there.

    Args:
        service: that runs them.
        answer_id: the comparison's id.
        contenders: the answers.
        diverges: whether adapters' answers are compared with the base.
    """

    def __init__(
        self, service: Service, answer_id: str, contenders: list[Contender], diverges: bool
    ) -> None:
        self.id = answer_id
        self.contenders = contenders
        self._service = service
        self._diverges = diverges
        self._key = key_id()
        self._tasks: list[asyncio.Task[None]] = []

    def names(self, adapter: AdapterSelection | None) -> str:
        """Who answers: the adapter's name, or the base's."""
        return adapter.name if adapter else self._service.base_name

    def start(self) -> dict[str, Any]:
        """The first event: which answers there will be."""
        answers = [
            {**one.tag, "id": one.request.request_id, "model": self.names(one.request.adapter)}
            for one in self.contenders
        ]
        return {"type": "start", "id": self.id, "answers": answers}

    def usage(self) -> dict[str, Any]:
        """Tokens of all answers; a prompt that several share counts once."""
        requests = [one.request for one in self.contenders]
        return usage_body(total_usage(requests, [one.gathered.ending for one in self.contenders]))

    @asynccontextmanager
    async def run(self) -> AsyncIterator[AsyncGenerator[dict[str, Any], None]]:
        """Submits everything and gives what happens, until all is said.

        Leaving early aborts what still runs.

        Raises:
            RequestError: an answer can never run.
            EngineStoppedError: the engine takes no more requests.
            OverloadedError: too many are waiting.
            RequestTimeoutError: from the events, when waiting or running took too long.
        """
        requests = [one.request for one in self.contenders]
        began = time.perf_counter()
        async with self._service.generate_all(requests) as answers:
            try:
                yield self._events(answers, began)
            finally:  # before the answers are closed, which must not happen while they are read
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                # A cancelled task knows its frames, and they know the comparison: in a circle the
                # adapters would count as in use until the collector comes by.
                self._tasks.clear()

    async def _events(
        self, answers: AsyncIterator[list[tuple[int, Event]]], began: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        happened: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        missing = len(self.contenders)

        async def generate() -> None:
            try:
                async for batch in answers:
                    for number, event in batch:
                        one = self.contenders[number]
                        for told in self._generated(one, event, began):
                            happened.put_nowait(told)
                        if isinstance(event, Finished | Failed):
                            self._keep(one)
                            self._tasks.append(asyncio.create_task(score(one)))
            except QloraServeError as error:
                happened.put_nowait(error)

        async def score(one: Contender) -> None:
            if self._wants_score(one):
                await self._score(one)
                happened.put_nowait({"type": "divergence", **one.tag, **(one.divergence() or {})})
            happened.put_nowait({"type": "complete"})

        self._tasks.append(asyncio.create_task(generate()))
        while missing:
            told = await happened.get()
            if isinstance(told, Exception):
                raise told
            if told["type"] == "complete":
                missing -= 1
            else:
                yield told

    def _keep(self, one: Contender) -> None:
        """Keeps a finished answer, so that it can be voted for."""
        ending = one.gathered.ending
        if isinstance(ending, Finished):
            answer = {"role": "assistant", "content": one.gathered.text}
            kept = answered(
                one.request, ending, one.seconds or 0.0, kind="comparison", source=self.id,
                variant=one.variant, key=self._key, user=None, prompt=one.prompt, answer=answer,
                id=one.request.request_id, choice=0,
            )  # fmt: skip
            self._service.feedback.record([kept])

    def _generated(self, one: Contender, event: Event, began: float) -> list[dict[str, Any]]:
        now = time.perf_counter() - began
        one.gathered.add(event)
        if isinstance(event, Finished | Failed):
            one.seconds = now
            return [{"type": "answer", **one.summary(self.names)}]
        if one.first_seconds is None:
            one.first_seconds = now
        tokens = one.tokens(event.logprobs)
        return [{"type": "delta", **one.tag, "text": event.text, "tokens": tokens}]

    def _wants_score(self, one: Contender) -> bool:
        has_ended_well = isinstance(one.gathered.ending, Finished)
        has_words = bool(one.gathered.token_ids) and one.request.adapter is not None
        return self._diverges and has_ended_well and has_words

    async def _score(self, one: Contender) -> None:
        """Compares a finished answer with the base: two passes over prompt and answer."""
        prompt, answer = one.request.prompt, tuple(one.gathered.token_ids)
        try:
            self._service.engine.runner.check_comparable(one.request.adapter)
            base = Score(len(prompt) - 1, answer)
            await self._pass(one, "base", base, None)
            own = Score(len(prompt) - 1, answer, base)
            await self._pass(one, "own", own, one.request.adapter)
        except EngineStoppedError:
            one.score_error = "the server is shutting down"
        except QloraServeError as error:
            one.score_error = str(error)
        else:
            base.hidden = None
            one.score = own

    async def _pass(
        self, one: Contender, name: str, score: Score, adapter: AdapterSelection | None
    ) -> None:
        request = GenerationRequest(
            f"{one.request.request_id}-{name}",
            (*one.request.prompt, *score.targets[:-1]),
            Sampling(max_tokens=1),
            adapter,
            client=one.request.client,
            score=score,
        )
        async with self._service.generate(request) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise QloraServeError(event.message)
