"""The scheduler counts right: property tests, without torch."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import run_step, sequence_of

from qlora_serve.serve.engine.blocks import BlockGroup, BlockManager
from qlora_serve.serve.engine.scheduler import (
    BLOCK_TOKENS,
    Limits,
    Scheduler,
    split_budget,
)

LIMITS = st.builds(
    Limits,
    max_sequences=st.integers(1, 5),
    cache_tokens=st.integers(48, 200),
    step_tokens=st.integers(1, 40),
    max_length=st.sampled_from([48, 64, 100]),
    windows=st.sampled_from([(None,), (None,), (24,), (None, 24), (40, None)]),
    even_context=st.sampled_from([None, 1, 30]),
    reuse_prefixes=st.sampled_from([True, True, True, False]),
)


SHAPE = st.tuples(
    st.integers(1, 50),  # tokens of the prompt
    st.integers(1, 20),  # of the answer
    st.sampled_from([None, "x", "y"]),
    st.sampled_from([0, 100]),  # prompts share beginnings
    st.sampled_from(["one", "other"]),
    st.sampled_from([0, 0, 1]),
)


class Memory:
    """Stands in for the KV cache: what each place of each block holds, by adapter and position."""

    def __init__(self, limits: Limits) -> None:
        self.groups = limits.groups
        self.held = [[[None] * BLOCK_TOKENS for _ in range(g.blocks)] for g in self.groups]

    def run(self, step) -> None:
        for copy in step.copies:
            self.held[copy.group][copy.target] = list(self.held[copy.group][copy.source])
        for chunk in step.chunks:  # every chunk writes before any of them is checked
            for number in range(len(self.groups)):
                for t in range(chunk.start, chunk.start + chunk.count):
                    self._block(chunk, number, t)[t % BLOCK_TOKENS] = self._meant(chunk, t)
        for chunk in step.chunks:
            for number, group in enumerate(self.groups):
                seen = 0 if group.window is None else max(0, chunk.start - group.window + 1)
                for t in range(seen, chunk.start + chunk.count):
                    place = self._block(chunk, number, t)[t % BLOCK_TOKENS]
                    assert place == self._meant(chunk, t), "a query sees another one's tokens"

    def _block(self, chunk, group: int, token: int) -> list:
        block = chunk.sequence.blocks.blocks[group][token // BLOCK_TOKENS]
        assert block >= 0, "a block that is still seen was given back"
        return self.held[group][block]

    @staticmethod
    def _meant(chunk, token: int) -> tuple:
        adapter = chunk.sequence.request.adapter
        return adapter and adapter.key, token, chunk.sequence.tokens(0, token + 1)


@settings(deadline=None, max_examples=150)
@given(limits=LIMITS, shapes=st.lists(SHAPE, max_size=20), seed=st.integers(0, 2**32))
def test_every_request_runs_to_its_end_on_its_own_tokens(limits, shapes, seed) -> None:
    """Whoever else runs, is aborted, shares a prefix or is preempted, each query finds in its
    blocks just its own tokens, computed with its own adapter; and in the end nothing is held."""
    choices = random.Random(seed)
    scheduler, memory = Scheduler(limits), Memory(limits)
    left = [
        sequence_of(n, prompt, most, adapter, start, client=client, priority=priority)
        for n, (prompt, most, adapter, start, client, priority) in enumerate(shapes)
        if limits.refusal(prompt, most) is None
    ]
    expected, ended, steps = len(left), 0, 0
    while ended < expected:
        steps += 1
        assert steps < 10_000, "someone never runs"
        while left and choices.random() < 0.4:
            scheduler.add(left.pop(0))
        step = scheduler.schedule()
        assert not step.failed
        if not step.chunks:
            assert scheduler.running == scheduler.waiting == 0
            continue
        assert sum(chunk.count for chunk in step.chunks) <= limits.step_tokens
        assert scheduler.running <= limits.max_sequences
        assert len({id(chunk.sequence) for chunk in step.chunks}) == len(step.chunks)
        memory.run(step)
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.count >= 1
            assert chunk.start == sequence.computed  # nothing skipped, nothing computed twice
            samples = chunk.samples
            assert samples == (chunk.start + chunk.count == sequence.length)
            scheduler.record(chunk)
            if samples:
                sequence.generated.append(choices.choice([1, 2]))
            done = len(sequence.generated) == sequence.request.sampling.max_tokens
            if done or choices.random() < 0.02:  # some are aborted
                scheduler.remove(sequence, keep=choices.random() < 0.8)
                ended += 1
    assert scheduler.blocks.used == 0
    assert scheduler.running == scheduler.waiting == 0


def test_a_beginning_is_computed_once_and_only_for_its_own_adapter() -> None:
    scheduler = Scheduler(Limits(4, 400, 400, 100))
    first = sequence_of(1, 60, 2, "x")
    scheduler.add(first)
    run_step(scheduler)
    same, other = sequence_of(2, 60, 2, "x"), sequence_of(3, 60, 2, "y")
    longer, shorter = sequence_of(4, 90, 2, "x"), sequence_of(5, 40, 2, "x")
    for sequence in (same, other, longer, shorter):
        scheduler.add(sequence)
    scheduler.remove(first)
    scheduler.schedule()
    # 60 tokens are three full blocks; the fourth is not offered, since it may still change.
    assert [s.cached for s in (same, other, longer, shorter)] == [48, 0, 48, 39]
    # 39 tokens end within a block, which was copied: the shared one stays as it was.
    assert shorter.blocks.blocks[0][:2] == same.blocks.blocks[0][:2]
    assert shorter.blocks.blocks[0][2] != same.blocks.blocks[0][2]


def test_bad_keys_and_values_are_not_handed_on() -> None:
    scheduler = Scheduler(Limits(4, 400, 400, 100))
    bad, next_one = sequence_of(1, 60, 2), sequence_of(2, 60, 2)
    scheduler.add(bad)
    run_step(scheduler)
    scheduler.remove(bad, keep=False)
    scheduler.add(next_one)
    scheduler.schedule()
    assert next_one.cached == 0


def test_a_window_keeps_only_its_blocks() -> None:
    manager = BlockManager([BlockGroup(10, window=20)], BLOCK_TOKENS, reuse=False)
    start = manager.begin("base", range(500), [0], 40)
    assert start is not None
    most = 0
    for count in range(40, 500, 40):
        assert manager.extend(start.table, count)
        most = max(most, manager.used)
        manager.computed(start.table, count, lambda first, n: range(first, first + n))
    assert most <= (20 + 40) // BLOCK_TOKENS + 2
    manager.release(start.table)
    assert manager.used == 0


def test_decoding_comes_before_prompts_and_long_prompts_are_cut() -> None:
    scheduler = Scheduler(Limits(4, 200, 8, 100))
    first, second = sequence_of(1, 3, 5), sequence_of(2, 30, 5)
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(second)
    found = [(c.sequence, c.start, c.count, c.samples) for c in scheduler.schedule().chunks]
    # Nobody waits for the end of this step's prompt: half of the 7 tokens that are left.
    assert found == [(first, 3, 1, True), (second, 0, 4, False)]


def test_a_step_is_full_of_prompts_only_where_one_of_them_ends() -> None:
    scheduler = Scheduler(Limits(4, 400, 80, 200, reuse_prefixes=False))
    scheduler.add(sequence_of(1, 150, 5))
    run_step(scheduler)
    scheduler.add(sequence_of(2, 30, 5))
    counts = []
    for _ in range(3):
        chunks = scheduler.schedule().chunks
        counts.append([chunk.count for chunk in chunks])
        for chunk in chunks:
            scheduler.record(chunk)
            if chunk.samples:
                chunk.sequence.generated.append(7)
    # The first step took 40 of the 150.
    assert counts == [[50, 30], [60, 1], [1, 1]]


def test_refusals_say_the_numbers() -> None:
    limits = Limits(4, 100, 8, 64)
    assert limits.refusal(10, 54) is None
    assert "make 65" in str(limits.refusal(10, 55))
    assert "at most 64" in str(limits.refusal(64, 1))
    assert limits.refusal(0, 1) == "the prompt is empty"


def test_tokens_spans_prompt_and_answer() -> None:
    sequence = sequence_of(1, 5, 5)
    sequence.generated += [50, 51, 52]
    assert sequence.tokens(0, 5) == [0, 1, 2, 3, 4]
    assert sequence.tokens(3, 4) == [3, 4, 50, 51]
    assert sequence.tokens(6, 2) == [51, 52]


def test_scheduler_does_not_need_torch() -> None:
    """In a fresh interpreter, importing it loads no torch."""
    import subprocess

    code = "import sys, qlora_serve.serve.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("budget", "needs", "shares"),
    [
        (100, [], []),
        (100, [30], [30]),
        (100, [500], [100]),
        (100, [500, 20], [80, 20]),
        (100, [500, 60, 60], [25, 60, 15]),
        (100, [10, 500, 500], [10, 90, 0]),
        (0, [5, 5], [0, 0]),
        (1, [5, 5], [1, 0]),
    ],
)
def test_a_step_is_split_shortest_first_with_a_part_for_the_oldest(budget, needs, shares) -> None:
    assert split_budget(budget, needs) == shares


@given(st.integers(0, 50), st.lists(st.integers(2, 60), max_size=8))
def test_a_split_hands_out_all_it_can(budget, needs) -> None:
    shares = split_budget(budget, needs)
    assert sum(shares) == min(budget, sum(needs))
    assert all(0 <= share <= need for share, need in zip(shares, needs, strict=True))


def test_steps_take_fewer_tokens_of_a_long_prompt_the_further_it_is() -> None:
    scheduler = Scheduler(Limits(1, 10_000, 100, 10_000, even_context=1000))
    scheduler.add(sequence_of(0, 3500, 1))
    counts = []
    while scheduler.running or scheduler.waiting:
        (chunk,) = scheduler.schedule().chunks
        counts.append(chunk.count)
        samples = chunk.samples
        scheduler.record(chunk)
        if samples:
            scheduler.remove(chunk.sequence)
    assert counts[0] == 50
    assert counts[:-2] == sorted(counts[:-2], reverse=True)
    assert sum(counts) == 3500
    costs, start = [], 0
    for count in counts[:-1]:
        costs.append(count * (1 + start / 1000))
        start += count
    assert max(costs) <= 50  # the prompt does not end in these
    assert min(costs) > 40
