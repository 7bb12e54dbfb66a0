"""How much a key may use: requests and tokens a minute, requests at once, tokens a day."""

import math
import time
from collections.abc import Callable

from qlora_serve.errors import RateLimitedError
from qlora_serve.serve.keys import KeyRecord

_MINUTE = 60.0
_DAY = 86400.0
_BUSY_RETRY_SECONDS = 1.0


class Bucket:
    """Holds up to `capacity` and fills evenly, within a minute; it may be overdrawn."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is in it now; below zero what is owed."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / _MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Takes out, whatever is in it."""
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """How long until so much is in it, were nothing taken meanwhile."""
        return max(0.0, (amount - self.level) * _MINUTE / self.capacity)


class Quota:
    """What one key has used. All of it happens on the event loop.

    A prompt's tokens must be there before it is let in, or the bucket must be full. An answer that
    has begun is never cut: its tokens are taken as they come, and what goes over is owed.
    """

    def __init__(
        self,
        record: KeyRecord,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall = clock, wall
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._day = self._today()
        self._used_today = 0
        self.inside = 0
        """Requests that are being worked on."""
        self.follow(record)

    def follow(self, record: KeyRecord) -> None:
        """Takes over the key's limits, which may have changed; what was used stays used."""
        self.record = record
        self._requests = self._resized(self._requests, record.requests_per_minute)
        self._tokens = self._resized(self._tokens, record.tokens_per_minute)

    def enter(self) -> None:
        """Lets a request in; `leave` must follow.

        Raises:
            RateLimitedError: there are too many at once, or too many this minute.
        """
        most = self.record.concurrent_requests
        if most is not None and self.inside >= most:
            raise RateLimitedError(
                f"this key may have {most} requests at once, and has {self.inside}; wait for one",
                _BUSY_RETRY_SECONDS,
                "requests",
            )
        if self._requests is not None:
            if self._requests.level < 1:
                raise RateLimitedError(
                    f"this key may send {self._requests.capacity} requests a minute",
                    self._requests.seconds_until(1),
                    "requests",
                )
            self._requests.take(1)
        self.inside += 1

    def leave(self) -> None:
        """A request has been answered, or given up."""
        self.inside -= 1

    def check(self, prompt_tokens: int) -> None:
        """Refuses prompts for which there are not enough tokens now.

        Raises:
            RateLimitedError: not this minute, or not today.
        """
        self._turn_day()
        most = self.record.tokens_per_day
        if most is not None and (
            self._used_today >= most or self._used_today + prompt_tokens > most
        ):
            raise RateLimitedError(
                f"this key may use {most} tokens a day and has used {self._used_today}; the prompt "
                f"has {prompt_tokens}",
                (self._day + 1) * _DAY - self._wall(),
                "tokens",
                "insufficient_quota",
            )
        bucket = self._tokens
        if bucket is not None:
            needed = min(max(1, prompt_tokens), bucket.capacity)
            if bucket.level < needed:
                raise RateLimitedError(
                    f"this key may use {bucket.capacity} tokens a minute; the prompt has "
                    f"{prompt_tokens} and {max(0, math.floor(bucket.level))} are left",
                    bucket.seconds_until(needed),
                    "tokens",
                )

    def charge(self, tokens: int) -> None:
        """Counts tokens of a prompt or an answer."""
        self._turn_day()
        self._used_today += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """What OpenAI's API says of limits, for those that there are."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                reset = bucket.seconds_until(bucket.capacity)
                found[f"x-ratelimit-reset-{name}"] = f"{reset:.3f}s"
        return found

    def _resized(self, bucket: Bucket | None, capacity: int | None) -> Bucket | None:
        if capacity is None:
            return None
        if bucket is None:
            return Bucket(capacity, self._clock)
        if bucket.capacity != capacity:
            resized = Bucket(capacity, self._clock)
            resized.take(bucket.capacity - bucket.level)
            return resized
        return bucket

    def _today(self) -> int:
        return int(self._wall() // _DAY)

    def _turn_day(self) -> None:
        today = self._today()
        if today != self._day:
            self._day, self._used_today = today, 0
