"""Who comes next: nobody starves, no flow holds up another; without torch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import run_step, sequence_of

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.queueing import MOST_PASSED
from qlora_serve.serve.engine.request import Sequence
from qlora_serve.serve.engine.scheduler import AlwaysResident, Limits, Scheduler


def test_who_came_last_gives_way_and_comes_back_first() -> None:
    scheduler = Scheduler(Limits(4, 64, 100, 64))
    old, young, new = sequence_of(1, 16, 40), sequence_of(2, 17, 40, start=50), sequence_of(3, 1, 1)
    scheduler.add(old)
    scheduler.add(young)
    while young in run_step(scheduler):
        pass
    assert old in scheduler.sequences()[: scheduler.running]
    assert scheduler.preemptions == 1
    generated = list(young.generated)
    scheduler.add(new)
    scheduler.remove(old)
    assert run_step(scheduler)[0] is young
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
    slow, broken = sequence_of(0, 5, 1, "slow"), sequence_of(1, 5, 1, "broken")
    scheduler.add(slow)
    scheduler.add(broken)
    step = scheduler.schedule()
    assert [s for s, _ in step.failed] == [broken]
    assert "gone" in step.failed[0][1]
    scheduler.remove(broken)
    for number in range(2, 2 + MOST_PASSED):
        quick = sequence_of(number, 5, 1, "there")
        scheduler.add(quick)
        assert run_step(scheduler) == [quick]
        scheduler.remove(quick)
    quick = sequence_of(number + 1, 5, 1, "there")
    scheduler.add(quick)
    assert run_step(scheduler) == []  # its time has come, so nobody passes it any more
    loading.ready.add("slow")
    assert run_step(scheduler) == [slow]
    scheduler.remove(slow)
    assert run_step(scheduler) == [quick]
    scheduler.remove(quick)
    assert loading.held == []


@pytest.mark.parametrize("by", ["adapter", "client"])
def test_a_busy_flow_does_not_hold_up_another(by) -> None:
    """One place, a hundred requests of one flow, then one of another: it comes next."""
    scheduler = Scheduler(Limits(1, 400, 100, 100))

    def of(number: int, flow: str) -> Sequence:
        more = {"client": flow} if by == "client" else {"adapter": flow}
        return sequence_of(number, 10, 1, **more)

    for number in range(100):
        scheduler.add(of(number, "busy"))
    first = run_step(scheduler)[0]
    quiet = of(100, "quiet")
    scheduler.add(quiet)
    scheduler.remove(first)
    assert run_step(scheduler) == [quiet]


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
                sequence_of(n, size, 1, client=str(flow), priority=priority, start=100 * flow)
                for n in range(count * 4)
            ]
        )
        for sequence in queues[-1]:
            scheduler.add(sequence)
    waited = [0] * len(flows)
    while scheduler.waiting or scheduler.running:
        for sequence in run_step(scheduler):
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
        scheduler.add(sequence_of(number, 10, 1, client="small"))
        scheduler.add(sequence_of(number, 40, 1, client="large", start=50))
    served = {"small": 0, "large": 0}
    for _ in range(100):
        (sequence,) = run_step(scheduler)
        served[sequence.request.client] += len(sequence.request.prompt) + 1
        scheduler.remove(sequence)
    assert abs(served["small"] - served["large"]) <= 2 * 41


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(Limits(4, 64, 100, 64))
    running, large = sequence_of(1, 20, 10), sequence_of(2, 30, 10, start=50)
    small = sequence_of(3, 1, 1, start=90)
    for sequence in (running, large, small):
        scheduler.add(sequence)
    assert run_step(scheduler) == [running]
    scheduler.remove(running)
    assert set(run_step(scheduler)) == {large, small}


def test_adapters_of_those_who_wait_for_a_place_are_loaded_ahead() -> None:
    class Watched(AlwaysResident):
        def __init__(self) -> None:
            self.ahead: list[list[str]] = []

        def prefetch(self, selections) -> None:
            self.ahead.append([selection.key for selection in selections])

    watched = Watched()
    scheduler = Scheduler(Limits(1, 400, 100, 100), watched)
    for number, adapter in enumerate(("runs", "next", None, "then")):
        scheduler.add(sequence_of(number, 5, 9, adapter))
    assert [s.request.request_id for s in run_step(scheduler)] == ["0"]
    assert watched.ahead == [["next", "then"]]
    run_step(scheduler)
    assert len(watched.ahead) == 1  # only when somebody has come or gone


def test_a_long_prompt_neither_stalls_others_nor_starves() -> None:
    """Short prompts pass it by at once, while it keeps a quarter of each step."""
    scheduler = Scheduler(Limits(8, 10_000, 40, 5000))
    long = sequence_of(0, 2000, 1)
    scheduler.add(long)
    for number in range(1, 30):
        short = sequence_of(number, 25, 1, start=5000 + 100 * number)
        scheduler.add(short)
        before = long.computed
        run_step(scheduler)
        assert short.computed == 25
        assert long.computed - before >= 10
        scheduler.remove(short)
