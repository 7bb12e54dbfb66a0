"""How many answers are on their way, for how long they may be, and what is measured of them."""

import asyncio
import time
from collections.abc import Callable, Sequence

from qlora_serve.errors import EngineStoppedError, OverloadedError, RequestTimeoutError
from qlora_serve.serve.api.limits import ApiLimits
from qlora_serve.serve.api.metrics import Metrics
from qlora_serve.serve.api.quota import Quota
from qlora_serve.serve.engine.request import Delta, Event, Failed, GenerationRequest


class Traffic:
    """Counts answers. All of it happens on the event loop.

    Args:
        limits: the caps.
        places: sequences that the engine runs at once; more wait.
        metrics: where to record.
    """

    def __init__(self, limits: ApiLimits, places: int, metrics: Metrics) -> None:
        self._limits = limits
        self._places = places
        self._metrics = metrics
        self.live = 0
        """Answers that have been accepted and have not ended."""
        self.is_draining = False
        """Whether new requests are refused because the server is about to end."""

    def enter(
        self,
        requests: Sequence[GenerationRequest],
        expire: Callable[[Exception], None],
        quota: Quota | None = None,
    ) -> "Passage":
        """Lets requests in.

        Args:
            requests: one for each answer.
            expire: called, at most once, when they have waited or run for too long.
            quota: what pays for their tokens.

        Raises:
            EngineStoppedError: the server is about to end.
            OverloadedError: too many are waiting already.
            RateLimitedError: the tokens of the prompts are not there.
        """
        if self.is_draining:
            raise EngineStoppedError("the server is shutting down")
        room = self._places + self._limits.queued - self.live
        if len(requests) > room:
            self._metrics.refused(requests)
            raise OverloadedError(
                f"{self.live} answers are on their way and this server queues "
                f"{self._limits.queued} beyond the {self._places} that it runs at once; try again"
            )
        if quota is not None:
            prompt_tokens = _prompt_tokens(requests)
            quota.check(prompt_tokens)
            quota.charge(prompt_tokens)
        self.live += len(requests)
        self._metrics.entered(requests)
        return Passage(self, requests, expire, quota)


class Passage:
    """Some requests on their way through the server."""

    def __init__(
        self,
        traffic: Traffic,
        requests: Sequence[GenerationRequest],
        expire: Callable[[Exception], None],
        quota: Quota | None,
    ) -> None:
        self._traffic = traffic
        self._quota = quota
        self._charged = [0] * len(requests)
        self._requests = requests
        self._latest: list[float | None] = [None] * len(requests)
        self._began = time.perf_counter()
        self._ended: set[int] = set()
        limits, loop = traffic._limits, asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        for name, seconds in (("wait", limits.wait_seconds), ("run", limits.run_seconds)):
            if seconds is not None:
                error = RequestTimeoutError(
                    f"the request had to {name} for longer than the {seconds:g} s that this server "
                    "allows"
                )
                self._timers[name] = loop.call_later(seconds, expire, error)

    def event(self, number: int, event: Event) -> None:
        """Records an event of one of them."""
        metrics, request = self._traffic._metrics, self._requests[number]
        if "wait" in self._timers:
            self._timers.pop("wait").cancel()
        if self._quota is not None:
            # As they come, so that an answer which is given up has been paid for as well.
            so_far = self._charged[number]
            if isinstance(event, Delta):
                total = so_far + len(event.token_ids)
            else:
                total = max(so_far, event.usage.completion_tokens)
            self._quota.charge(total - so_far)
            self._charged[number] = total
        if not isinstance(event, Delta):
            self._ended.add(number)
            reason = "error" if isinstance(event, Failed) else event.reason
            metrics.ended(request, event.usage, reason)
            return
        now, before = time.perf_counter(), self._latest[number]
        self._latest[number] = now
        if before is None:
            metrics.first_token(request, now - self._began)
        else:
            metrics.next_tokens(request, now - before, max(1, len(event.token_ids)))

    def leave(self) -> None:
        """They have ended, or nobody waits for them any longer."""
        for timer in self._timers.values():
            timer.cancel()
        for number, request in enumerate(self._requests):
            if number not in self._ended:
                self._traffic._metrics.left(request)
        self._traffic.live -= len(self._requests)


def _prompt_tokens(requests: Sequence[GenerationRequest]) -> int:
    """A prompt that choices share counts once, as in `usage`."""
    return sum({id(request.prompt): len(request.prompt) for request in requests}.values())
