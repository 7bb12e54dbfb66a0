"""The scheduler counts right: property tests, without torch."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_serve.serve.engine.request import GenerationRequest, Sampling, Sequence
from qlora_serve.serve.engine.scheduler import Limits, Scheduler, split_budget


def _sequence(number: int, prompt: int, max_tokens: int) -> Sequence:
    request = GenerationRequest(str(number), tuple(range(prompt)), Sampling(max_tokens))
    return Sequence(request, deliver=lambda event: None)


LIMITS = st.builds(
    Limits,
    max_sequences=st.integers(1, 4),
    cache_tokens=st.integers(40, 120),
    step_tokens=st.integers(1, 20),
    max_length=st.just(40),
)


@settings(deadline=None, max_examples=200)
@given(
    limits=LIMITS,
    shapes=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 10)), max_size=12),
    choices=st.randoms(use_true_random=False),
)
def test_every_request_runs_to_its_end_within_the_limits(limits, shapes, choices) -> None:
    scheduler = Scheduler(limits)
    pending = [_sequence(n, prompt, most) for n, (prompt, most) in enumerate(shapes)]
    left = list(pending)
    ended: list[Sequence] = []
    steps = 0
    while len(ended) < len(pending):
        steps += 1
        assert steps < 10_000, "someone never runs"
        while left and choices.random() < 0.5:
            scheduler.add(left.pop(0))
        chunks = scheduler.schedule()
        if not chunks:
            assert scheduler.running == scheduler.waiting == 0
            continue
        assert sum(chunk.count for chunk in chunks) <= limits.step_tokens
        assert scheduler.running <= limits.max_sequences
        running = scheduler.sequences()[: scheduler.running]
        assert scheduler.reserved_tokens == sum(s.most_tokens for s in running)
        assert scheduler.reserved_tokens <= limits.cache_tokens
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.count >= 1
            assert chunk.start == sequence.computed  # nothing skipped, nothing computed twice
            assert chunk.samples == (chunk.start + chunk.count == sequence.length)
            sequence.computed += chunk.count
            if chunk.samples:
                sequence.generated.append(0)
            done = len(sequence.generated) == sequence.request.sampling.max_tokens
            if done or choices.random() < 0.02:  # some are aborted
                scheduler.remove(sequence)
                ended.append(sequence)
    assert scheduler.reserved_tokens == 0
    assert scheduler.running == scheduler.waiting == 0


def test_decoding_comes_before_prompts_and_long_prompts_are_cut() -> None:
    scheduler = Scheduler(Limits(4, 200, 8, 100))
    first, second = _sequence(1, 3, 5), _sequence(2, 30, 5)
    scheduler.add(first)
    for chunk in scheduler.schedule():
        chunk.sequence.computed += chunk.count
    first.generated.append(9)
    scheduler.add(second)
    found = [(c.sequence, c.start, c.count, c.samples) for c in scheduler.schedule()]
    assert found == [(first, 3, 1, True), (second, 0, 7, False)]


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(Limits(4, 50, 100, 50))
    running, large, small = _sequence(1, 10, 10), _sequence(2, 30, 10), _sequence(3, 1, 1)
    for sequence in (running, large, small):
        scheduler.add(sequence)
    assert [c.sequence for c in scheduler.schedule()] == [running]
    scheduler.remove(running)
    assert {c.sequence for c in scheduler.schedule()} == {large, small}


def test_refusals_say_the_numbers() -> None:
    limits = Limits(4, 100, 8, 64)
    assert limits.refusal(10, 54) is None
    assert "make 65" in str(limits.refusal(10, 55))
    assert "at most 64" in str(limits.refusal(64, 1))
    assert limits.refusal(0, 1) == "the prompt is empty"


def test_tokens_spans_prompt_and_answer() -> None:
    sequence = _sequence(1, 5, 5)
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


def test_a_long_prompt_neither_stalls_others_nor_starves() -> None:
    """Short prompts pass it by at once, while it keeps a quarter of each step."""
    scheduler = Scheduler(Limits(8, 10_000, 40, 5000))
    long = _sequence(0, 2000, 1)
    scheduler.add(long)
    for number in range(1, 30):
        short = _sequence(number, 25, 1)
        scheduler.add(short)
        before = long.computed
        for chunk in scheduler.schedule():
            chunk.sequence.computed += chunk.count
        assert short.computed == 25
        assert long.computed - before >= 10
        scheduler.remove(short)
