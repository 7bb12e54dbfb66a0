"""Which adapters are on the device: bytes, references, pins and turns. No tensors here.

A `Slot` is the place of one adapter's content. An `AdapterSelection` is what one request asked for:
one or several slots, each with a scale. `slot_table.SlotTable` decides what is loaded and what has
to go; `residency.Residency` does the loading, and calls the table under its lock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol
from weakref import WeakSet

SlotState = Literal["absent", "loading", "resident", "failed"]
SlotKey = tuple[str, float]
"""The identity of the content, and the scale that is worked into the device's tensors. The latter
is 1 but for DoRA, whose gain holds for one scale only."""


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter on the device with the scale that a request gives it, for a step."""

    resident: Any
    """A `lora.ResidentAdapter`."""
    scale: float


@dataclass(eq=False)
class Slot:
    """The place of one adapter's content on the device."""

    key: SlotKey
    size: int
    """Bytes on the device: an upper bound until it is resident."""
    content: Any = None
    """What the loader needs to find it."""
    state: SlotState = "absent"
    resident: Any = None
    """The `lora.ResidentAdapter` while the state is resident."""
    error: str = ""
    """Why loading failed."""
    references: int = 0
    """Sequences that run with it."""
    is_pinned: bool = False
    has_name: bool = True
    """Whether a name still points to the content. If not it may be nowhere else, so it stays for
    those whom it was promised."""
    used: int = 0
    """The table's clock when a sequence last took or left it."""
    selections: WeakSet["AdapterSelection"] = field(default_factory=WeakSet)
    """The requests that have been promised this content and have not ended."""

    @property
    def is_held(self) -> bool:
        """Whether it must stay where it is."""
        is_promised = not self.has_name and len(self.selections) > 0
        return self.references > 0 or self.is_pinned or is_promised


@dataclass(frozen=True, eq=False)
class AdapterSelection:
    """The adapters of one request, pinned by content: names are for display only."""

    name: str
    """The adapter's name, or `a+b` of a composition."""
    parts: tuple[tuple[Slot, float], ...]
    """Slots with the factor that is applied on top of what is worked into them."""

    def __post_init__(self) -> None:
        for slot in self.slots:
            slot.selections.add(self)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The slots, each once."""
        return tuple(dict.fromkeys(slot for slot, _ in self.parts))

    @cached_property
    def key(self) -> tuple[tuple[str, float], ...]:
        """(identity, scale) of each part: requests of the same key compute the same."""
        return tuple((slot.key[0], slot.key[1] * factor) for slot, factor in self.parts)

    @property
    def identity(self) -> str:
        """The content's identity; those of a composition joined by `+`."""
        return "+".join(slot.key[0] for slot, _ in self.parts)

    @property
    def vocabulary(self) -> int | None:
        """The tokens that it knows, where that is more than the base's."""
        return max((slot.content.vocabulary or 0 for slot in self.slots), default=0) or None

    @property
    def tokens(self) -> Any:
        """The adapter's own `AdapterTokens`; None for the base's, as a composition has."""
        return self.slots[0].content.tokens if len(self.slots) == 1 else None

    @property
    def residents(self) -> tuple[ScaledAdapter, ...]:
        """What a step applies, one after the other. Only while the selection is acquired."""
        return tuple(ScaledAdapter(slot.resident, factor) for slot, factor in self.parts)


class AdapterSlots(Protocol):
    """What the scheduler knows of adapters. Called on the engine's thread, but for `prefetch`."""

    def acquire(self, selection: Any) -> bool:
        """Takes a selection's adapters for one sequence; None, the base, is always there.

        True: all are on the device and stay there until `release`, which is owed once for each
        True. False: not now; loading has begun, or there is no room yet, and the engine is woken
        when that changes. A False for one says nothing about another: ask for everyone who waits,
        and go on asking, since places are given in turn.

        Raises:
            AdapterError: it can never be loaded, or loading failed; fails that request only.
        """

    def prefetch(self, selections: Sequence[Any]) -> None:
        """Begins to load what those who have no place yet will need, the next in turn first.

        It takes nothing: an adapter may have to go again before its request gets a place. May be
        called from any thread.
        """

    def release(self, selection: Any) -> None:
        """Gives back what one True of `acquire` took."""

    def withdraw(self, selection: Any) -> None:
        """Gives up a turn that `acquire` began and that will not be asked for again."""
