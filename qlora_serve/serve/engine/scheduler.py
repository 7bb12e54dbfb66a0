"""Who runs in the next step. It counts tokens and places, and never touches a tensor."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_serve.serve.engine import request


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

    sequence: request.Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that a next one can be chosen."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """Admits in order; everyone who decodes gets a token before a prompt gets a chunk.

    A sequence is admitted only when the cache can hold all that it may ever reach, so a running
    one never has to wait or be put back.

    Of the prompts that have begun, the shortest rest goes first (it ends soonest, which keeps the
    mean time to a first token low), but a quarter of the step always goes to the one that was
    admitted first, so that a stream of short prompts cannot hold up a long one for ever.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[request.Sequence] = deque()
        self._running: list[request.Sequence] = []
        self._reserved = 0

    def add(self, sequence: request.Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def remove(self, sequence: request.Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its room back."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._reserved -= sequence.most_tokens
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty when there is nothing to do."""
        self._admit()
        decoding = [s for s in self._running if s.length - s.computed == 1]
        prompts = [s for s in self._running if s.length - s.computed > 1]
        chunks = [Chunk(s, s.computed, 1) for s in decoding[: self.limits.step_tokens]]
        shares = split_budget(
            self.limits.step_tokens - len(chunks), [s.length - s.computed for s in prompts]
        )
        chunks += [Chunk(s, s.computed, n) for s, n in zip(prompts, shares, strict=True) if n]
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

    def sequences(self) -> list[request.Sequence]:
        """Every sequence that has not ended."""
        return [*self._running, *self._waiting]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_sequences:
            needed = self._waiting[0].most_tokens
            if self._reserved + needed > self.limits.cache_tokens:
                return  # strictly in order: a small one that overtook could starve a large one
            self._reserved += needed
            self._running.append(self._waiting.popleft())


_OLDEST_SHARE = 4
"""The oldest prompt is sure of one part in this many of a step's tokens."""


def split_budget(budget: int, needs: Sequence[int]) -> list[int]:
    """Splits a step's tokens among prompts: the shortest first, a part for the oldest.

    Args:
        budget: tokens to hand out.
        needs: tokens that each prompt still has to compute, the oldest first.

    Returns:
        Tokens for each, in the order of `needs`; their sum is `budget`, or all that is needed.
    """
    shares = [0] * len(needs)
    if not needs or budget <= 0:
        return shares
    shares[0] = min(needs[0], max(1, budget // _OLDEST_SHARE))
    budget -= shares[0]
    for index in sorted(range(len(needs)), key=needs.__getitem__):
        more = min(needs[index] - shares[index], budget)
        shares[index] += more
        budget -= more
    return shares
