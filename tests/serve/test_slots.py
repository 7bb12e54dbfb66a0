"""Who is on the device: never too much, nobody thrown out, everyone in turn."""

import random
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.slot_table import SlotTable
from qlora_serve.serve.engine.slots import AdapterSelection

CAPACITY = 100


def _select(table: SlotTable, *wanted: tuple[int, int]) -> AdapterSelection:
    parts = tuple((table.slot((f"id{n}", 1.0), size, None), 1.0) for n, size in wanted)
    return AdapterSelection("+".join(f"a{n}" for n, _ in wanted), parts)


def _finish_loads(table: SlotTable) -> None:
    while starting := table.to_load():
        for slot in starting:
            table.loaded(slot, "weights", slot.size)


def _take(table: SlotTable, selection: AdapterSelection) -> bool:
    for _ in range(3):
        if table.acquire(selection):
            return True
        _finish_loads(table)
    return False


def test_the_least_recently_used_makes_room() -> None:
    table = SlotTable(CAPACITY)
    selections = [_select(table, (n, 40)) for n in range(3)]
    for selection in selections[:2]:
        assert _take(table, selection)
        table.release(selection)
    assert table.acquire(selections[0])  # now 1 is the older
    table.release(selections[0])
    assert _take(table, selections[2])
    states = [selection.slots[0].state for selection in selections]
    assert states == ["resident", "absent", "resident"]
    assert selections[1].slots[0].resident is None
    assert table.used == 80


def test_what_comes_next_is_loaded_ahead_but_throws_out_nobody_who_runs() -> None:
    table = SlotTable(CAPACITY)
    runs, idle, following, later = (_select(table, (n, 40)) for n in range(4))
    for selection in (runs, idle):
        assert _take(table, selection)
    table.release(idle)
    table.prefetch([following, later])  # there is room for the first of them only
    assert [slot.key[0] for slot in table.to_load()] == ["id2"]
    assert [s.slots[0].state for s in (runs, idle, later)] == ["resident", "absent", "absent"]
    table.loaded(following.slots[0], "weights", 40)
    table.prefetch([following, later])
    assert table.to_load() == []
    assert table.acquire(following)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    table = SlotTable(CAPACITY)
    with pytest.raises(AdapterError, match=r"needs 101 bytes.*gives 100"):
        table.acquire(_select(table, (1, 101)))
    pinned = _select(table, (2, 60))
    table.pin(pinned.slots[0])
    with pytest.raises(AdapterError, match="needs 41 bytes on the device beside 60 of pinned"):
        table.acquire(_select(table, (3, 41)))
    with pytest.raises(AdapterError, match="pinning needs 41"):
        table.pin(_select(table, (3, 41)).slots[0])
    assert table.waiting == 0


def test_a_failed_load_fails_those_who_wait_and_is_tried_again_for_new_ones() -> None:
    table = SlotTable(CAPACITY)
    waiting = [_select(table, (1, 10)) for _ in range(3)]
    assert not any(table.acquire(selection) for selection in waiting)
    (slot,) = table.to_load()
    table.failed(slot, "the file is gone")
    for selection in waiting:
        with pytest.raises(AdapterError, match="the file is gone"):
            table.acquire(selection)
    assert table.waiting == table.used == 0
    assert _take(table, _select(table, (1, 10)))


def test_a_large_one_gets_its_room_although_small_ones_keep_coming() -> None:
    """Small adapters stay resident and are taken again and again, never all free at once."""
    table = SlotTable(CAPACITY, patience=5)
    small = [_select(table, (n, 50)) for n in range(2)]
    assert all(_take(table, selection) for selection in small)
    large = _select(table, (9, 80))
    held = list(small)
    for turn in range(20):
        if table.acquire(large):
            break
        _finish_loads(table)
        new = _select(table, (turn % 2, 50))
        if table.acquire(new):
            held.append(new)
        if held:
            table.release(held.pop(0))
    else:
        pytest.fail("the large adapter never got its room")


def test_who_was_promised_room_and_does_not_come_cannot_block_the_others() -> None:
    table = SlotTable(CAPACITY)
    gone = _select(table, (1, 90))
    assert not table.acquire(gone)
    _finish_loads(table)
    other = _select(table, (2, 90))
    assert _take(table, other)
    table.release(other)
    del gone  # its request ended without a word
    assert table.waiting == 0


def test_withdrawing_lets_the_next_one_go() -> None:
    table = SlotTable(CAPACITY)
    running, first, second = (_select(table, (n, size)) for n, size in ((1, 60), (2, 90), (3, 40)))
    assert _take(table, running)
    assert not table.acquire(first)
    assert not table.acquire(second)
    assert table.to_load() == []  # in turn: the second does not overtake
    table.withdraw(first)
    assert table.to_load() == [second.slots[0]]


def test_sweeping_drops_what_no_name_and_no_request_needs() -> None:
    table = SlotTable(CAPACITY)
    kept, held, dropped = (_select(table, (n, 20)) for n in range(3))
    for selection in (kept, held, dropped):
        assert _take(table, selection)
    for selection in (kept, dropped):
        table.release(selection)
    del kept, dropped, selection
    table.sweep(lambda identity: identity == "id0")
    assert sorted(slot.key[0] for slot in table.slots()) == ["id0", "id1"]
    table.release(held)
    table.sweep(lambda identity: identity == "id0")
    assert sorted(slot.key[0] for slot in table.slots()) == ["id0", "id1"]  # still promised
    del held
    table.sweep(lambda identity: identity == "id0")
    assert [slot.key[0] for slot in table.slots()] == ["id0"]


def _index(data, items: list) -> int:
    """Not the item itself: hypothesis would keep it alive, and a request that ends must go."""
    return data.draw(st.integers(0, len(items) - 1))


class Slots(RuleBasedStateMachine):
    """Requests of random adapters come, run, end and leave; loads end or fail in any order."""

    @initialize(sizes=st.lists(st.integers(1, 60), min_size=8, max_size=8))
    def begin(self, sizes: list[int]) -> None:
        self.table = SlotTable(CAPACITY, patience=3)
        self.sizes = sizes
        self.waiting: list[AdapterSelection] = []
        self.running: list[AdapterSelection] = []
        self.loading: list = []

    def _poll(self, selection: AdapterSelection) -> None:
        try:
            if self.table.acquire(selection):
                self.waiting.remove(selection)
                self.running.append(selection)
        except AdapterError:
            self.waiting.remove(selection)

    @rule(adapters=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    def come(self, adapters: list[int]) -> None:
        self.waiting.append(_select(self.table, *((n, self.sizes[n]) for n in adapters)))
        self._poll(self.waiting[-1])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ask(self, data) -> None:
        self._poll(self.waiting[_index(data, self.waiting)])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data) -> None:
        self.table.withdraw(self.waiting.pop(_index(data, self.waiting)))

    @rule(count=st.integers(1, 3))
    def look_ahead(self, count: int) -> None:
        self.table.prefetch(self.waiting[:count])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data) -> None:
        self.table.release(self.running.pop(_index(data, self.running)))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), works=st.integers(0, 4))
    def load(self, data, works: int) -> None:
        slot = self.loading.pop(_index(data, self.loading))
        if works:
            self.table.loaded(slot, object(), slot.size - works % slot.size // 2)
        else:
            self.table.failed(slot, "broken")

    @rule(number=st.integers(0, 7))
    def pin(self, number: int) -> None:
        with suppress(AdapterError):  # there is no room for one more
            self.table.pin(self.table.slot((f"id{number}", 1.0), self.sizes[number], None))

    @rule(number=st.integers(0, 7))
    def unpin(self, number: int) -> None:
        self.table.unpin(self.table.slot((f"id{number}", 1.0), self.sizes[number], None))

    @rule(named=st.sets(st.integers(0, 7)))
    def sweep(self, named: set[int]) -> None:
        self.table.sweep(lambda identity: int(identity[2:]) in named)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "table"):
            return
        self.loading += self.table.to_load()
        slots = self.table.slots()
        assert self.table.used <= CAPACITY
        assert len(self.loading) == len(set(self.loading))
        assert {s for s in slots if s.state == "loading"} == set(self.loading)
        for selection in self.running:
            assert all(slot.state == "resident" for slot in selection.slots)
            assert all(one.resident is not None for one in selection.residents)
        for slot in slots:
            assert slot.references == sum(slot in s.slots for s in self.running)
            assert (slot.resident is not None) == (slot.state == "resident")
        assert self.table.waiting <= len(self.waiting)

    def teardown(self) -> None:
        """Whatever happened: when the running ones end and loads work, everyone gets a turn."""
        if not hasattr(self, "table"):
            return
        order = random.Random(0)
        for _ in range(40 * (len(self.waiting) + len(self.running) + 1)):
            self.holds()
            for slot in self.loading:
                self.table.loaded(slot, object(), slot.size)
            self.loading = []
            if self.running:
                selection = self.running.pop(order.randrange(len(self.running)))
                self.table.release(selection)
                del selection  # a request that has ended keeps nothing
            if not self.waiting:
                break
            # One at a time, always the first: the least that a scheduler may do.
            self._poll(self.waiting[0])
        assert self.waiting == [], "someone never got a turn"
        while self.running:
            self.table.release(self.running.pop())
        assert all(slot.references == 0 for slot in self.table.slots())
        assert self.table.waiting == 0


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
