"""Who runs in the next step. It counts tokens, blocks and places, and never touches a tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine import request
from qlora_serve.serve.engine.blocks import BlockGroup, BlockManager, Copy
from qlora_serve.serve.engine.queueing import FairQueue, adapter_key, rank
from qlora_serve.serve.engine.slots import AdapterSlots

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Limits:
    """What the scheduler may hand out."""

    max_sequences: int
    """Requests that run at once."""
    cache_tokens: int
    """Tokens whose keys and values are kept at once, over all requests."""
    step_tokens: int
    """Tokens that one step may compute; a longer prompt is computed in chunks."""
    max_length: int
    """Tokens of prompt and answer together, for one request."""
    windows: tuple[int | None, ...] = (None,)
    """The sliding windows of the model's layers, each once; None for layers that see all."""
    even_context: int | None = None
    """Tokens of context at which a token's attention costs as much as its linear layers: from
    there on a step takes fewer tokens of a prompt, so that steps stay equally short."""
    reuse_prefixes: bool = True
    """Whether a prompt that begins like an earlier one takes over its keys and values."""
    block_tokens: int = BLOCK_TOKENS
    """Tokens of a block; flash-attn wants larger ones."""

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The blocks of each group of layers, in the order of `windows`."""
        return tuple(
            BlockGroup(self.group_tokens(window) // self.block_tokens, window)
            for window in self.windows
        )

    def group_tokens(self, window: int | None) -> int:
        """Tokens that layers of this window keep: never more than all requests' windows."""
        if window is None:
            return self.cache_tokens
        return min(self.cache_tokens, self.max_sequences * self._windowed(window))

    def _windowed(self, window: int) -> int:
        """Tokens of one request that layers of this window hold at once, at most; whole blocks."""
        blocks = -(-(window + self.step_tokens) // self.block_tokens) + 2
        return blocks * self.block_tokens

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that one request may reach."""
        ends = [self.max_length]
        for group in self.groups:
            held = group.blocks * self.block_tokens
            # A windowed group gives blocks back on the way, if it holds a window and a bit.
            if group.window is None or held < group.window + 2 * self.block_tokens:
                ends.append(held)
        return min(ends)

    def refusal(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Why a request can never run, or None."""
        if prompt_tokens == 0:
            return "the prompt is empty"
        longest = self.longest
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
        return self.completes and self.sequence.request.score is None

    @property
    def completes(self) -> bool:
        """Whether the chunk reaches the last known token."""
        return self.start + self.count == self.sequence.length

    @property
    def scored(self) -> int:
        """How many of its last tokens are to be scored."""
        score = self.sequence.request.score
        if score is None:
            return 0
        return max(0, self.start + self.count - max(self.start, score.first))

    @property
    def outputs(self) -> int:
        """How many of its last tokens need logits of their own."""
        score = self.sequence.request.score
        return int(self.samples) if score is None or not score.needs_logits else self.scored


@dataclass(frozen=True)
class Step:
    """What is to be computed together."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    """Blocks to copy before anything else."""
    admitted: list[request.Sequence] = field(default_factory=list)
    """Sequences that got their place for this step; the copies are theirs."""
    failed: list[tuple[request.Sequence, str]] = field(default_factory=list)
    """Sequences that can never run, and why; they are still to be removed."""


class AlwaysResident:
    """Every adapter is there."""

    def acquire(self, selection: Any) -> bool:
        """Always True."""
        return True

    def prefetch(self, selections: Sequence[Any]) -> None:
        """Nothing to do."""

    def release(self, selection: Any) -> None:
        """Nothing to do."""

    def withdraw(self, selection: Any) -> None:
        """Nothing to do."""


class Scheduler:
    """Admits fairly; everyone who decodes gets a token before a prompt gets a chunk.

    A sequence is admitted when there are blocks for all that is known of it. Its answer takes
    blocks as it grows; when there are none left, the running sequence that came last (of the
    lowest priority) gives back its own and its place, and is computed again later. The one that
    came first can therefore always go on, so every one ends.

    Of the prompts that have begun, the shortest rest goes first (it ends soonest, which keeps the
    mean time to a first token low), but a quarter of the step always goes to the one that was
    admitted first, so that a stream of short prompts cannot hold up a long one for ever. A step in
    which no prompt would end takes half as much of them: what comes meanwhile waits for its end.
    """

    def __init__(self, limits: Limits, adapters: AdapterSlots | None = None) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.groups, limits.block_tokens, limits.reuse_prefixes)
        self.preemptions = 0
        """How often a running sequence had to give back its place."""
        self._adapters: AdapterSlots = adapters or AlwaysResident()
        self._queue = FairQueue()
        self._running: list[request.Sequence] = []
        self._looks_ahead = False
        """Whether somebody came or went since adapters were last loaded ahead."""

    def add(self, sequence: request.Sequence) -> None:
        """Puts a sequence at the end of its flow's queue."""
        self._queue.add(sequence)
        self._looks_ahead = True

    def remove(self, sequence: request.Sequence, keep: bool = True) -> None:
        """Takes a sequence out, wherever it is, and gives its room back.

        Args:
            sequence: one that was added and not removed yet.
            keep: whether its keys and values may serve other requests; False when they are bad.
        """
        if sequence in self._running:
            self._stop_running(sequence, keep)
        else:
            self._adapters.withdraw(sequence.request.adapter)
        self._queue.forget(sequence)
        self._looks_ahead = True

    def schedule(self) -> Step:
        """The next step; without chunks when there is nothing that can run now."""
        step = Step()
        self._admit(step)
        if self._looks_ahead:
            self._prefetch()
        while self._running and not step.chunks:  # again where all of a step gave way to others
            counts = self._share_out()
            # Blocks go by rank: whoever has to give way comes later in this very loop.
            for sequence in sorted(counts, key=rank):
                start = sequence.computed
                end = self._secure(sequence, start + counts[sequence])
                if end > start:
                    step.chunks.append(Chunk(sequence, start, end - start))
        return step

    def record(self, chunk: Chunk) -> None:
        """A chunk has been computed; call it before its next token is added."""
        sequence = chunk.sequence
        sequence.computed += chunk.count
        self.blocks.computed(sequence.blocks, sequence.computed, sequence.tokens)
        if chunk.samples:
            self._queue.charge(sequence, 1)

    def preempt(self, sequence: request.Sequence) -> None:
        """Takes a running sequence's room; it starts again when its turn comes."""
        self._stop_running(sequence, keep=True)
        self._queue.put_back(sequence)
        self.preemptions += 1

    @property
    def waiting(self) -> int:
        """Sequences that have no place."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Sequences that have a place."""
        return len(self._running)

    def sequences(self) -> list[request.Sequence]:
        """Every sequence that has not ended, the running ones first."""
        return [*self._running, *self._queue]

    @staticmethod
    def _is_decoding(sequence: request.Sequence) -> bool:
        return sequence.length - sequence.computed == 1

    def _admit(self, step: Step) -> None:
        while len(self._running) < self.limits.max_sequences and len(self._queue):
            if not self._admit_one(step):
                return

    def _prefetch(self) -> None:
        """Has the adapters of the next few loaded while those who run still hold the room."""
        self._looks_ahead = False
        if self._running and len(self._queue):
            following = self._queue.candidates()[:_PREFETCHED]
            adapters = [sequence.request.adapter for sequence in following]
            self._adapters.prefetch([adapter for adapter in adapters if adapter is not None])

    def _admit_one(self, step: Step) -> bool:
        hopeless = {id(sequence) for sequence, _ in step.failed}
        for sequence in self._queue.candidates():
            if id(sequence) in hopeless:
                continue
            try:
                is_there = self._adapters.acquire(sequence.request.adapter)
            except AdapterError as error:
                step.failed.append((sequence, str(error)))
                return True
            if not is_there:
                continue
            if self._begin(sequence, step):
                return True
            self._adapters.release(sequence.request.adapter)
            return False  # a small one that overtook could starve a large one
        return False

    def _begin(self, sequence: request.Sequence, step: Step) -> bool:
        """Gives a sequence its place, if there are blocks for all that is known of it."""
        start = self.blocks.begin(
            adapter_key(sequence),
            sequence.tokens(0, sequence.length),
            spare=self._promised(),
            chunk=self.limits.step_tokens,
            # What is to be scored has to be computed.
            most_cached=None if sequence.request.score is None else sequence.request.score.first,
        )
        if start is None:
            return False
        self._queue.admit(sequence)
        self._running.append(sequence)
        sequence.blocks, sequence.computed = start.table, start.cached
        if not sequence.generated:
            sequence.cached = start.cached
        step.copies.extend(start.copies)
        step.admitted.append(sequence)
        return True

    def _promised(self) -> list[int]:
        """Blocks of each group that those who run will want soon: their prompts, and one more."""
        spare = [len(self._running)] * len(self.limits.windows)
        for other in self._running:
            missing = self.blocks.missing(
                other.blocks, other.computed, other.length, self.limits.step_tokens
            )
            spare = [kept + more for kept, more in zip(spare, missing, strict=True)]
        return spare

    def _share_out(self) -> dict[request.Sequence, int]:
        """How many tokens of each running sequence the step should compute."""
        running = sorted(self._running, key=rank)
        decoding = [s for s in running if self._is_decoding(s)][: self.limits.step_tokens]
        prompts = [s for s in running if not self._is_decoding(s)]
        rests = scorable(prompts, SCORED_TOKENS)
        # What a prompt's rest costs, in tokens at the beginning of one.
        factors = [self._cost(s) for s in prompts]
        needs = [math.ceil(rest * factor) for rest, factor in zip(rests, factors, strict=True)]
        budget = self.limits.step_tokens - len(decoding)
        if needs and min(needs) > budget:
            # No prompt ends in this step: only those wait for it who come while it runs.
            budget = math.ceil(budget / 2)
        shares = split_budget(budget, needs)
        counts = dict.fromkeys(decoding, 1)
        for s, rest, share, factor in zip(prompts, rests, shares, factors, strict=True):
            if share:
                counts[s] = min(rest, max(1, int(share / factor)))
        return counts

    def _cost(self, sequence: request.Sequence) -> float:
        """What the sequence's next token costs, in tokens without context."""
        even = self.limits.even_context
        return 1.0 if even is None else 1.0 + sequence.computed / even

    def _secure(self, sequence: request.Sequence, tokens: int) -> int:
        """Gets blocks for the first `tokens` tokens, from those of lower rank if need be.

        Returns:
            The tokens that there is room for now: fewer than asked for when nobody is left who
            could give way; 0 when the sequence itself lost its place.
        """
        if sequence not in self._running:
            return 0  # it gave way to another one of this step
        while not self.blocks.extend(sequence.blocks, tokens):
            last = max(self._running, key=rank)
            reach = self.blocks.reach(sequence.blocks)
            if last is sequence and reach > sequence.computed:
                tokens = min(tokens, reach)
            else:
                self.preempt(last)
                if last is sequence:
                    return 0
        return tokens

    def _stop_running(self, sequence: request.Sequence, keep: bool) -> None:
        self._running.remove(sequence)
        self._adapters.release(sequence.request.adapter)
        self.blocks.release(sequence.blocks, keep)
        sequence.blocks, sequence.computed = None, 0


_PREFETCHED = 4
"""Requests without a place whose adapters are loaded ahead."""
SCORED_TOKENS = 64
"""Tokens that one step may score; each costs two rows over the whole vocabulary."""


def scorable(prompts: Sequence[request.Sequence], room: int) -> list[int]:
    """Tokens that each prompt still has to compute, as far as the step has room to score them.

    Args:
        prompts: the oldest first.
        room: tokens that may be scored, over all of them.
    """
    needs = []
    for sequence in prompts:
        end, score = sequence.length, sequence.request.score
        if score is not None:
            begin = max(sequence.computed, score.first)
            end = min(end, begin + room)
            room -= end - begin
        needs.append(end - sequence.computed)
    return needs


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
