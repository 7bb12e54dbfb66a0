"""Loading adapters beside decoding: disk → host memory → device, in a thread of its own."""

import logging
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from qlora_serve.adapters.weights import AdapterWeights
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.slot_table import SlotTable
from qlora_serve.serve.engine.slots import AdapterSelection, Slot, SlotKey

log = logging.getLogger(__name__)

Load = Callable[[Slot], tuple[Any, int]]
"""A slot → its `lora.ResidentAdapter` and the bytes that it takes on the device."""


class HostCache:
    """Checked weights in the host's memory, the least recently used going first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(weights.size_bytes for weights in self._held.values())

    def __contains__(self, identity: object) -> bool:
        with self._lock:
            return identity in self._held

    def get(self, identity: str) -> AdapterWeights | None:
        """The weights of a content, if they are here."""
        with self._lock:
            weights = self._held.get(identity)
            if weights is not None:
                self._held.move_to_end(identity)
            return weights

    def put(self, weights: AdapterWeights) -> None:
        """Keeps weights, where they fit at all."""
        with self._lock:
            self._held.pop(weights.identity, None)
            room = self.capacity - weights.size_bytes
            if room < 0:
                return
            total = sum(held.size_bytes for held in self._held.values())
            while total > room:
                total -= self._held.popitem(last=False)[1].size_bytes
            self._held[weights.identity] = weights

    def keep_only(self, is_wanted: Callable[[str], bool]) -> None:
        """Drops what nobody wants."""
        with self._lock:
            for identity in [identity for identity in self._held if not is_wanted(identity)]:
                del self._held[identity]


class Residency:
    """The `AdapterSlots` that the engine uses. Its methods may be called from any thread."""

    def __init__(self, capacity: int, load: Load) -> None:
        self._table = SlotTable(capacity)
        self._load = load
        # Reentrant: collecting a selection may run other code of ours on the same thread.
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.wake: Callable[[], None] = lambda: None
        """Called from the loader's thread when a load has ended; set by the engine's owner."""

    @property
    def capacity(self) -> int:
        """Bytes on the device for adapters."""
        return self._table.capacity

    @property
    def used(self) -> int:
        """Bytes on the device that are taken."""
        with self._lock:
            return self._table.used

    def acquire(self, selection: AdapterSelection | None) -> bool:
        """See `AdapterSlots.acquire`."""
        if selection is None:
            return True
        with self._lock:
            try:
                is_there = self._table.acquire(selection)
                if not is_there and self._table.wants_retry(selection):
                    self.wake()
                return is_there
            finally:
                self._hand_over()

    def prefetch(self, selections: Sequence[AdapterSelection]) -> None:
        """See `AdapterSlots.prefetch`."""
        with self._lock:
            self._table.prefetch(selections)
            self._hand_over()

    def release(self, selection: AdapterSelection | None) -> None:
        """See `AdapterSlots.release`."""
        if selection is None:
            return
        with self._lock:
            self._table.release(selection)
            self._hand_over()

    def withdraw(self, selection: AdapterSelection | None) -> None:
        """See `AdapterSlots.withdraw`."""
        if selection is None:
            return
        with self._lock:
            self._table.withdraw(selection)
            self._hand_over()

    def select(self, name: str, parts: list[tuple[SlotKey, int, Any, float]]) -> AdapterSelection:
        """A selection for one request.

        Args:
            name: for display.
            parts: a slot's key, size and content, and the factor to apply on top.

        Raises:
            AdapterError: the parts do not fit on the device together.
        """
        with self._lock:
            slots = [self._table.slot(key, size, content) for key, size, content, _ in parts]
            reason = self._table.refusal(slots)
            if reason is not None:
                raise AdapterError(f"adapter {name!r} {reason}")
            factors = [factor for *_, factor in parts]
            selection = AdapterSelection(name, tuple(zip(slots, factors, strict=True)))
        weakref.finalize(selection, self._promise_ended).atexit = False
        return selection

    def refusal(self, size: int) -> str | None:
        """Why an adapter of so many bytes can never be on the device, or None."""
        with self._lock:
            return self._table.refusal([], size)

    def pin(self, key: SlotKey, size: int, content: Any, is_pinned: bool) -> None:
        """Loads a content and keeps it, or lets it go again.

        Raises:
            AdapterError: there is no room for it beside what is pinned already.
        """
        with self._lock:
            slot = self._table.slot(key, size, content)
            if is_pinned:
                self._table.pin(slot)
            else:
                self._table.unpin(slot)
            self._hand_over()

    def adopt(self, key: SlotKey, content: Any, resident: Any, size: int) -> bool:
        """Takes in what was loaded outside, where there is free room."""
        with self._lock:
            return self._table.adopt(self._table.slot(key, size, content), resident, size)

    def slots(self) -> list[Slot]:
        """Every slot that is there or wanted, for listings."""
        with self._lock:
            return self._table.slots()

    def moves(self) -> tuple[dict[str, int], dict[str, int]]:
        """How often each content arrived on the device, and had to go; by identity."""
        with self._lock:
            return dict(self._table.loads), dict(self._table.evictions)

    def sweep(self, is_named: Callable[[str], bool]) -> set[str]:
        """Drops slots that nobody needs; returns the identities that requests still wait for."""
        with self._lock:
            self._table.sweep(is_named)
            self._hand_over()
            return {slot.key[0] for slot in self._table.slots()}

    def close(self) -> None:
        """Ends the loader's thread; a load that has begun is finished first."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._queue.put(None)
        if thread is not None:
            thread.join()

    def _promise_ended(self) -> None:
        """Content that was kept for a request may make room now.

        Runs wherever the last reference goes, perhaps under our own lock: so it only asks the
        engine to look again.
        """
        if self._table.waiting:
            self.wake()

    def _hand_over(self) -> None:
        """Gives the loader what the table has decided; called under the lock."""
        for slot in self._table.to_load():
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="adapters", daemon=True)
                self._thread.start()
            self._queue.put(slot)

    def _run(self) -> None:
        while (slot := self._queue.get()) is not None:
            self._load_one(slot)
            del slot  # while it waits, the thread keeps nothing alive
            self.wake()

    def _load_one(self, slot: Slot) -> None:
        try:
            resident, size = self._load(slot)
        except Exception as error:  # must reach those who wait, whatever it was
            if not isinstance(error, AdapterError):
                log.exception("loading an adapter failed")
            with self._lock:
                self._table.failed(slot, str(error) or type(error).__name__)
                self._hand_over()
            return
        with self._lock:
            self._table.loaded(slot, resident, size)
            self._hand_over()
