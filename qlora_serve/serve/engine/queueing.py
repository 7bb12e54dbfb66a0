"""Who is admitted next: fair between adapters and between clients, and nobody waits for ever.

Requests of one client for one adapter are a flow, first come first served. Among flows the one that
has been served the fewest tokens goes next (the virtual token counter of arXiv:2401.00588): a
prompt is charged when it is admitted, an answer token by token. A flow that comes back after a
pause starts at the level of the least served one, so that idling earns no credit.

Priorities come before fairness, and what cannot start yet (its adapter is being loaded) is passed
by. Both could starve someone, so the head of a flow that has been passed by `MOST_PASSED` times
goes before everything else, the longest waiting first.
"""

import itertools
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from qlora_serve.serve.engine.request import Sequence

MOST_PASSED = 64
"""Admissions of others that the head of a flow has to let pass, at most."""


@dataclass(eq=False)
class _Flow:
    key: Hashable
    served: float
    """Tokens charged so far."""
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0
    passed: int = 0
    """Admissions of others since the head became the head."""
    last: int = 0
    """When it was admitted last; of two that are level the one that waits longer goes first."""


class FairQueue:
    """The sequences that have no place yet."""

    def __init__(self) -> None:
        self._flows: dict[Hashable, _Flow] = {}
        self._returned: list[Sequence] = []
        """Preempted: they had their turn already, so they come first, the oldest first."""
        self._arrivals = itertools.count()
        self._admissions = itertools.count(1)

    def __len__(self) -> int:
        return len(self._returned) + sum(len(flow.waiting) for flow in self._flows.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for flow in self._flows.values():
            yield from flow.waiting

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of its flow."""
        key = flow_of(sequence)
        flow = self._flows.get(key)
        if flow is None:
            level = min((f.served for f in self._flows.values()), default=0.0)
            flow = self._flows[key] = _Flow(key, level)
        sequence.arrival = next(self._arrivals)
        flow.waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Takes back a sequence that had been admitted; it is not charged again."""
        self._returned.append(sequence)
        self._returned.sort(key=rank)
        self._flows[flow_of(sequence)].running -= 1

    def candidates(self) -> list[Sequence]:
        """Who may be admitted, in the order in which to try.

        When someone has been passed by too often there is only that one.
        """
        flows = [flow for flow in self._flows.values() if flow.waiting]
        overdue = [flow for flow in flows if flow.passed >= MOST_PASSED]
        if overdue:
            first = min(overdue, key=lambda flow: rank(flow.waiting[0])[1])
            return [*self._returned, first.waiting[0]]

        def turn(flow: _Flow) -> tuple[int, float, int, int]:
            priority, arrival = rank(flow.waiting[0])
            return priority, flow.served, flow.last, arrival

        return [*self._returned, *(flow.waiting[0] for flow in sorted(flows, key=turn))]

    def admit(self, sequence: Sequence) -> None:
        """Takes out a candidate that gets its place now."""
        chosen = self._flows[flow_of(sequence)]
        chosen.running += 1
        if sequence in self._returned:
            self._returned.remove(sequence)
            return
        assert chosen.waiting[0] is sequence
        chosen.waiting.popleft()
        chosen.passed, chosen.last = 0, next(self._admissions)
        for flow in self._flows.values():
            if flow is not chosen and flow.waiting:
                flow.passed += 1
        self.charge(sequence, len(sequence.request.prompt))

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Counts tokens that were computed for a sequence's flow."""
        self._flows[flow_of(sequence)].served += tokens

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, waiting or running."""
        flow = self._flows[flow_of(sequence)]
        if sequence in self._returned:
            self._returned.remove(sequence)
        elif sequence in flow.waiting:
            if flow.waiting[0] is sequence:
                flow.passed = 0
            flow.waiting.remove(sequence)
        else:
            flow.running -= 1
        if not flow.waiting and not flow.running and sequence not in self._returned:
            returned = any(flow_of(other) == flow.key for other in self._returned)
            if not returned:
                del self._flows[flow.key]


def rank(sequence: Sequence) -> tuple[int, int]:
    """What orders two sequences when room is short: priority, then arrival."""
    return sequence.request.priority, sequence.arrival


def flow_of(sequence: Sequence) -> Hashable:
    """Whose turn a sequence takes."""
    return sequence.request.client, adapter_key(sequence)


def adapter_key(sequence: Sequence) -> Hashable:
    """What the sequence's keys and values depend on besides its tokens; None for the base."""
    adapter = sequence.request.adapter
    return None if adapter is None else adapter.key
