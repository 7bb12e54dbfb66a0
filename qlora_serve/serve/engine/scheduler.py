"""Who runs in the next step. It counts tokens and places, and never touches a tensor."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_serve.serve.engine.request import Sequence


@dataclass(frozen=True)
class Limits:
    """What the scheduler may hand out."""

    max_sequences: int
    """Requests that run at once."""
    cache_tokens: int
    """Tokens whose keys and values may be kept at once, over all requests."""
    step_tokens: int
    """Tokens that one step may compute; a longer prompt is computed in chunks."""
    max_length: int
    """Tokens of prompt and answer together, for one request."""

    def refusal(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Why a request can never run, or None."""
        if prompt_tokens == 0:
            return "the prompt is empty"
        longest = min(self.max_length, self.cache_tokens)
        if prompt_tokens >= longest:
            return (
                f"the prompt has {prompt_tokens} tokens; this server takes at most {longest} "
                "for prompt and answer together"
            )
        if prompt_tokens + max_tokens > longest:
            return (
                f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} make "
                f"{prompt_tokens + max_tokens}; this server takes at most {longest} together"
            )
        return None


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from `start`, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that a next one can be chosen."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """First come, first served; everyone who runs gets a token before a prompt gets a chunk.

    A sequence is admitted only when the cache can hold all that it may ever reach, so a running
    one never has to wait or be put back.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._reserved = 0

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its room back."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._reserved -= sequence.most_tokens
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty when there is nothing to do."""
        self._admit()
        budget = self.limits.step_tokens
        chunks = []
        for sequence in self._decoding_first():
            count = min(sequence.length - sequence.computed, budget)
            if count == 0:
                break
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
        return chunks

    @property
    def waiting(self) -> int:
        """Sequences that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have a place."""
        return len(self._running)

    @property
    def reserved_tokens(self) -> int:
        """Cache tokens promised to the running sequences."""
        return self._reserved

    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [*self._running, *self._waiting]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_sequences:
            needed = self._waiting[0].most_tokens
            if self._reserved + needed > self.limits.cache_tokens:
                return  # strictly in order: a small one that overtook could starve a large one
            self._reserved += needed
            self._running.append(self._waiting.popleft())

    def _decoding_first(self) -> Iterator[Sequence]:
        yield from (s for s in self._running if s.length - s.computed == 1)
        yield from (s for s in self._running if s.length - s.computed > 1)
