"""What is loaded onto the device, and what makes room for it."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.slots import AdapterSelection, Slot, SlotKey

_RETRIES = 3
_PATIENCE = 32
"""Requests that may pass one that waits for room, before room is kept for it."""


@dataclass
class _Turn:
    rank: int
    """Lower goes first."""
    passed: int = 0
    """Sequences that went ahead with adapters whose room this one needs."""
    asked: int = 0
    """The table's clock when it was last asked for."""
    retries: int = 0
    """How often it was to be asked for again at once."""


class SlotTable:
    """Decides who is on the device. Not safe by itself for several threads.

    Bytes never exceed the capacity, and a slot that is referenced or pinned never goes. Room is
    given strictly in turn; adapters that are resident may be taken by others meanwhile, but only
    so often that the one who waits gets its room.
    """

    def __init__(self, capacity: int, patience: int = _PATIENCE) -> None:
        self.capacity = capacity
        self._patience = patience
        self._slots: dict[SlotKey, Slot] = {}
        self._turns: WeakKeyDictionary[AdapterSelection, _Turn] = WeakKeyDictionary()
        self._clock = 0
        self._starting: list[Slot] = []
        self.loads: Counter[str] = Counter()
        """How often each content arrived, by identity; forgotten with its name."""
        self.evictions: Counter[str] = Counter()
        """How often each had to make room."""

    def slot(self, key: SlotKey, size: int, content: Any) -> Slot:
        """The slot of a content; a failed one may be tried again from here on."""
        slot = self._slots.setdefault(key, Slot(key, size, content))
        slot.has_name = True
        if slot.state == "failed":
            slot.state, slot.error = "absent", ""
        if slot.state == "absent":
            slot.size, slot.content = size, content
        return slot

    def slots(self) -> list[Slot]:
        """Every slot that is there or wanted."""
        return list(self._slots.values())

    @property
    def used(self) -> int:
        """Bytes that are taken, those being loaded included."""
        return sum(s.size for s in self._slots.values() if s.state in ("loading", "resident"))

    @property
    def waiting(self) -> int:
        """Selections that wait for their turn."""
        return len(self._turns)

    def acquire(self, selection: AdapterSelection) -> bool:
        """See `AdapterSlots.acquire`."""
        failed = next((slot for slot in selection.slots if slot.state == "failed"), None)
        reason = failed.error if failed is not None else self.refusal(selection.slots)
        if reason is not None:
            self.withdraw(selection)
            raise AdapterError(reason)
        is_here = all(slot.state == "resident" for slot in selection.slots)
        if is_here and not self._must_let_pass(selection):
            self._turns.pop(selection, None)
            for slot in selection.slots:
                slot.references += 1
                slot.used = self._tick()
            return True
        turn = self._turns.setdefault(selection, _Turn(self._tick()))
        self._begin()
        self._rescue(selection, turn)
        turn.asked = self._tick()
        return False

    def prefetch(self, selections: Sequence[AdapterSelection]) -> None:
        """See `AdapterSlots.prefetch`; while somebody waits for room, that comes first."""
        promised: set[Slot] = set()
        for selection in selections:
            promised.update(selection.slots)
            missing = [slot for slot in selection.slots if slot.state == "absent"]
            if self._turns or not self._make_room(sum(slot.size for slot in missing), promised):
                return
            for slot in selection.slots:
                slot.used = self._tick()  # what is there should not make room before it is used
            for slot in missing:
                slot.state = "loading"
            self._starting += missing

    def release(self, selection: AdapterSelection) -> None:
        """See `AdapterSlots.release`."""
        for slot in selection.slots:
            assert slot.references > 0, "released more often than acquired"
            slot.references -= 1
            slot.used = self._tick()
        self._begin()

    def withdraw(self, selection: AdapterSelection) -> None:
        """See `AdapterSlots.withdraw`."""
        if self._turns.pop(selection, None) is not None:
            self._begin()

    def refusal(self, slots: Iterable[Slot], more: int = 0) -> str | None:
        """Why these can never be on the device together, or None.

        Args:
            slots: what must be there at once.
            more: bytes of something else that must be there as well.
        """
        wanted = set(slots)
        needed = sum(slot.size for slot in wanted) + more
        pinned = sum(s.size for s in self._slots.values() if s.is_pinned and s not in wanted)
        if needed + pinned <= self.capacity:
            return None
        beside = f" beside {pinned} of pinned adapters" if pinned else ""
        return (
            f"needs {needed} bytes on the device{beside}, and --adapter-memory gives "
            f"{self.capacity}; give more"
        )

    def pin(self, slot: Slot) -> None:
        """Loads a slot and keeps it.

        Raises:
            AdapterError: pinned adapters would leave no room for this one.
        """
        reason = self.refusal([slot])
        if reason is not None:
            raise AdapterError(f"pinning {reason}")
        self._slots.setdefault(slot.key, slot)
        slot.is_pinned = True
        self._begin()

    def unpin(self, slot: Slot) -> None:
        """Lets a slot go when there is need."""
        slot.is_pinned = False
        self._begin()

    def adopt(self, slot: Slot, resident: Any, size: int) -> bool:
        """Takes in what was loaded outside, where that needs no turn of anyone's."""
        if slot.state != "absent" or self._turns or self.used + size > self.capacity:
            return False
        self._slots.setdefault(slot.key, slot)
        self.loaded(slot, resident, size)
        return True

    @property
    def is_still(self) -> bool:
        """Whether nothing will happen by itself: nothing is held, and nothing loads."""
        slots = self._slots.values()
        return not any(slot.references or slot.state == "loading" for slot in slots)

    def wants_retry(self, selection: AdapterSelection) -> bool:
        """Whether one who waits should be asked for again at once: no event will call for it.

        A few times only, which `_rescue` needs; else the engine would spin until memory that is
        kept for someone who does not run yet is given up.
        """
        turn = self._turns.get(selection)
        if turn is None or not self.is_still or turn.retries >= _RETRIES:
            return False
        turn.retries += 1
        return True

    def to_load(self) -> list[Slot]:
        """The slots for which loading has been decided since the last call."""
        starting, self._starting = self._starting, []
        return starting

    def loaded(self, slot: Slot, resident: Any, size: int) -> None:
        """A slot's content has arrived; `size` is what it takes, in bytes."""
        slot.state, slot.resident, slot.size, slot.used = "resident", resident, size, self._tick()
        self.loads[slot.key[0]] += 1
        self._begin()

    def failed(self, slot: Slot, error: str) -> None:
        """A slot's content could not be loaded."""
        slot.state, slot.error = "failed", error
        self._begin()

    def sweep(self, is_named: Callable[[str], bool]) -> None:
        """Drops slots that no request and no name needs any more.

        Args:
            is_named: whether a name points to an identity.
        """
        for slot in self.slots():
            slot.has_name = is_named(slot.key[0])
            if slot.is_held or slot.state == "loading" or slot.selections:
                continue
            if slot.state != "resident" or not slot.has_name:
                _empty(slot)
                del self._slots[slot.key]
        held = {slot.key[0] for slot in self._slots.values()}
        for counts in (self.loads, self.evictions):
            for identity in [i for i in counts if i not in held and not is_named(i)]:
                del counts[identity]
        self._begin()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _in_turn(self) -> list[AdapterSelection]:
        turns = list(self._turns.items())
        return [selection for selection, turn in sorted(turns, key=lambda item: item[1].rank)]

    def _begin(self) -> None:
        """Starts every load for which it is the turn and there is room."""
        pinned = [s for s in self._slots.values() if s.is_pinned and s.state == "absent"]
        wanted = [(slot,) for slot in pinned] + [s.slots for s in self._in_turn()]
        promised: set[Slot] = set()
        for slots in wanted:
            missing = [slot for slot in slots if slot.state == "absent"]
            promised.update(slots)
            if not missing:
                continue
            if not self._make_room(sum(slot.size for slot in missing), promised):
                return  # strictly in turn: small ones that overtook could starve a large one
            for slot in missing:
                slot.state = "loading"
            self._starting += missing

    def _make_room(self, needed: int, promised: set[Slot]) -> bool:
        """Evicts the least recently used until `needed` bytes are free; nothing if not enough."""
        lacking = needed - (self.capacity - self.used)
        victims = []
        candidates = (s for s in self._slots.values() if s.state == "resident" and not s.is_held)
        for slot in sorted(candidates, key=lambda slot: slot.used):
            if lacking <= 0:
                break
            if slot not in promised:
                victims.append(slot)
                lacking -= slot.size
        if lacking > 0:
            return False
        for slot in victims:
            self.evictions[slot.key[0]] += 1
            _empty(slot)
        return True

    def _must_let_pass(self, selection: AdapterSelection) -> bool:
        """Whether someone who waits for room has let enough others go ahead."""
        first = next(
            (s for s in self._in_turn() if any(x.state == "absent" for x in s.slots)), None
        )
        if first is None or first is selection:
            return False
        if all(slot.is_pinned or slot in first.slots for slot in selection.slots):
            return False  # takes nothing that could make room
        turn = self._turns[first]
        own = self._turns.get(selection)
        if own is not None and own.rank < turn.rank:
            return False  # came before
        turn.passed += 1
        return turn.passed > self._patience

    def _rescue(self, selection: AdapterSelection, turn: _Turn) -> None:
        """Puts the one who asks first where nothing else would ever move.

        That is when nothing is held and nothing loads, but the room is promised to others who have
        not come for it since this one last asked.
        """
        if all(slot.state in ("resident", "failed") for slot in selection.slots):
            return
        if not self.is_still:
            return
        if any(other.asked >= turn.asked for other in self._turns.values() if other is not turn):
            return
        turn.rank = min(other.rank for other in self._turns.values()) - 1
        for slot in self._slots.values():
            if all(other in self._turns for other in slot.selections):
                slot.has_name = True  # kept for those who do not come: no longer
        self._begin()


def _empty(slot: Slot) -> None:
    if slot.state != "loading":
        slot.state, slot.resident = "absent", None
