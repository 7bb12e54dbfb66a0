"""The scheduler counts right: property tests, without torch."""

import random
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.blocks import BlockGroup, BlockManager
from qlora_serve.serve.engine.queueing import MOST_PASSED
from qlora_serve.serve.engine.request import GenerationRequest, Sampling, Sequence
from qlora_serve.serve.engine.scheduler import (
    BLOCK_TOKENS,
    AlwaysResident,
    Limits,
    Scheduler,
    split_budget,
)


@dataclass(frozen=True)
class Adapter:
    key: str


def _sequence(
    number: int, prompt: int, max_tokens: int, adapter: str | None = None, start: int = 0, **more
) -> Sequence:
    chosen = None if adapter is None else Adapter(adapter)
    tokens = tuple(range(start, start + prompt))
    request = GenerationRequest(str(number), tokens, Sampling(max_tokens), chosen, **more)
    return Sequence(request, deliver=lambda event: None)


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
        _sequence(n, prompt, most, adapter, start, client=client, priority=priority)
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


def _run(scheduler: Scheduler) -> list[Sequence]:
    """One step; returns who was in it."""
    step = scheduler.schedule()
    for chunk in step.chunks:
        samples = chunk.samples
        scheduler.record(chunk)
        if samples:
            chunk.sequence.generated.append(9)
    return [chunk.sequence for chunk in step.chunks]


def test_a_beginning_is_computed_once_and_only_for_its_own_adapter() -> None:
    scheduler = Scheduler(Limits(4, 400, 400, 100))
    first = _sequence(1, 60, 2, "x")
    scheduler.add(first)
    _run(scheduler)
    same, other = _sequence(2, 60, 2, "x"), _sequence(3, 60, 2, "y")
    longer, shorter = _sequence(4, 90, 2, "x"), _sequence(5, 40, 2, "x")
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
    bad, next_one = _sequence(1, 60, 2), _sequence(2, 60, 2)
    scheduler.add(bad)
    _run(scheduler)
    scheduler.remove(bad, keep=False)
    scheduler.add(next_one)
    scheduler.schedule()
    assert next_one.cached == 0


def test_who_came_last_gives_way_and_comes_back_first() -> None:
    scheduler = Scheduler(Limits(4, 64, 100, 64))
    old, young, new = _sequence(1, 16, 40), _sequence(2, 17, 40, start=50), _sequence(3, 1, 1)
    scheduler.add(old)
    scheduler.add(young)
    while young in _run(scheduler):
        pass
    assert old in scheduler.sequences()[: scheduler.running]
    assert scheduler.preemptions == 1
    generated = list(young.generated)
    scheduler.add(new)
    scheduler.remove(old)
    assert _run(scheduler)[0] is young
    assert young.generated[: len(generated)] == generated  # nothing is said twice


def test_an_adapter_that_is_not_there_yet_is_passed_by_but_not_for_ever() -> None:
    class Loading:
        def __init__(self) -> None:
            self.ready, self.held = {"there"}, []

        def acquire(self, adapter) -> bool:
            if adapter.key == "broken":
                raise AdapterError("it is gone")
            if adapter.key in self.ready:
                self.held.append(adapter.key)
            return adapter.key in self.ready

        def prefetch(self, adapters) -> None:
            pass

        def withdraw(self, adapter) -> None:
            pass

        def release(self, adapter) -> None:
            self.held.remove(adapter.key)

    loading = Loading()
    scheduler = Scheduler(Limits(1, 400, 100, 100), loading)
    slow, broken = _sequence(0, 5, 1, "slow"), _sequence(1, 5, 1, "broken")
    scheduler.add(slow)
    scheduler.add(broken)
    step = scheduler.schedule()
    assert [s for s, _ in step.failed] == [broken]
    assert "gone" in step.failed[0][1]
    scheduler.remove(broken)
    for number in range(2, 2 + MOST_PASSED):
        quick = _sequence(number, 5, 1, "there")
        scheduler.add(quick)
        assert _run(scheduler) == [quick]
        scheduler.remove(quick)
    quick = _sequence(number + 1, 5, 1, "there")
    scheduler.add(quick)
    assert _run(scheduler) == []  # its time has come, so nobody passes it any more
    loading.ready.add("slow")
    assert _run(scheduler) == [slow]
    scheduler.remove(slow)
    assert _run(scheduler) == [quick]
    scheduler.remove(quick)
    assert loading.held == []


@pytest.mark.parametrize("by", ["adapter", "client"])
def test_a_busy_flow_does_not_hold_up_another(by) -> None:
    """One place, a hundred requests of one flow, then one of another: it comes next."""
    scheduler = Scheduler(Limits(1, 400, 100, 100))

    def of(number: int, flow: str) -> Sequence:
        more = {"client": flow} if by == "client" else {"adapter": flow}
        return _sequence(number, 10, 1, **more)

    for number in range(100):
        scheduler.add(of(number, "busy"))
    first = _run(scheduler)[0]
    quiet = of(100, "quiet")
    scheduler.add(quiet)
    scheduler.remove(first)
    assert _run(scheduler) == [quiet]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    counts=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    priorities=st.lists(st.sampled_from([0, 0, 5]), min_size=5, max_size=5),
    places=st.integers(1, 3),
)
def test_nobody_is_passed_by_for_ever(sizes, counts, priorities, places) -> None:
    """While the head of a flow waits, at most MOST_PASSED + the number of flows are admitted."""
    scheduler = Scheduler(Limits(places, 1000, 200, 100))
    flows = list(zip(sizes, counts, priorities, strict=False))
    queues: list[list[Sequence]] = []
    for flow, (size, count, priority) in enumerate(flows):
        queues.append(
            [
                _sequence(n, size, 1, client=str(flow), priority=priority, start=100 * flow)
                for n in range(count * 4)
            ]
        )
        for sequence in queues[-1]:
            scheduler.add(sequence)
    waited = [0] * len(flows)
    while scheduler.waiting or scheduler.running:
        for sequence in _run(scheduler):
            flow = int(sequence.request.client)
            assert sequence is queues[flow].pop(0)  # within a flow, in order
            waited[flow] = 0
            for other, queue in enumerate(queues):
                waited[other] += other != flow and bool(queue)
            scheduler.remove(sequence)
        assert max(waited) <= MOST_PASSED + len(flows) + places


def test_flows_get_the_same_number_of_tokens() -> None:
    """Two flows, prompts of 10 and of 40 tokens: the tokens even out, not the requests."""
    scheduler = Scheduler(Limits(1, 400, 200, 100))
    for number in range(200):
        scheduler.add(_sequence(number, 10, 1, client="small"))
        scheduler.add(_sequence(number, 40, 1, client="large", start=50))
    served = {"small": 0, "large": 0}
    for _ in range(100):
        (sequence,) = _run(scheduler)
        served[sequence.request.client] += len(sequence.request.prompt) + 1
        scheduler.remove(sequence)
    assert abs(served["small"] - served["large"]) <= 2 * 41


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
    first, second = _sequence(1, 3, 5), _sequence(2, 30, 5)
    scheduler.add(first)
    _run(scheduler)
    scheduler.add(second)
    found = [(c.sequence, c.start, c.count, c.samples) for c in scheduler.schedule().chunks]
    assert found == [(first, 3, 1, True), (second, 0, 7, False)]


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(Limits(4, 64, 100, 64))
    running, large = _sequence(1, 20, 10), _sequence(2, 30, 10, start=50)
    small = _sequence(3, 1, 1, start=90)
    for sequence in (running, large, small):
        scheduler.add(sequence)
    assert _run(scheduler) == [running]
    scheduler.remove(running)
    assert set(_run(scheduler)) == {large, small}


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
        short = _sequence(number, 25, 1, start=5000 + 100 * number)
        scheduler.add(short)
        before = long.computed
        _run(scheduler)
        assert short.computed == 25
        assert long.computed - before >= 10
        scheduler.remove(short)


def test_steps_take_fewer_tokens_of_a_long_prompt_the_further_it_is() -> None:
    scheduler = Scheduler(Limits(1, 10_000, 100, 10_000, even_context=1000))
    scheduler.add(_sequence(0, 3500, 1))
    counts = []
    while scheduler.running or scheduler.waiting:
        (chunk,) = scheduler.schedule().chunks
        counts.append(chunk.count)
        samples = chunk.samples
        scheduler.record(chunk)
        if samples:
            scheduler.remove(chunk.sequence)
    assert counts[0] == 100
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == 3500
    costs, start = [], 0
    for count in counts[:-1]:
        costs.append(count * (1 + start / 1000))
        start += count
    assert max(costs) <= 100
    assert min(costs) > 90


def test_adapters_of_those_who_wait_for_a_place_are_loaded_ahead() -> None:
    class Watched(AlwaysResident):
        def __init__(self) -> None:
            self.ahead: list[list[str]] = []

        def prefetch(self, selections) -> None:
            self.ahead.append([selection.key for selection in selections])

    watched = Watched()
    scheduler = Scheduler(Limits(1, 400, 100, 100), watched)
    for number, adapter in enumerate(("runs", "next", None, "then")):
        scheduler.add(_sequence(number, 5, 9, adapter))
    assert [s.request.request_id for s in _run(scheduler)] == ["0"]
    assert watched.ahead == [["next", "then"]]
    _run(scheduler)
    assert len(watched.ahead) == 1  # only when somebody has come or gone
