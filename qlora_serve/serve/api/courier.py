"""Events from the engine's thread to the tasks that wait for them on the event loop."""

import asyncio
from collections import deque
from typing import Any


class Mailbox:
    """What has come for one task, in order. All of it happens on the event loop."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        """Adds something, and wakes who waits."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All that is there, as soon as there is something."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


class Courier:
    """Carries from another thread to mailboxes; however much there is, the loop is woken once.

    Waking the loop costs a system call, and a step of the engine has an event for every sequence.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Mailbox, Any]] = deque()
        self._is_called = False

    def send(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox, item: Any) -> None:
        """From another thread: puts `item` into `mailbox`, soon."""
        self._under_way.append((mailbox, item))
        if not self._is_called:
            self._is_called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before anything is taken out: what is added from now on calls again.
        self._is_called = False
        while self._under_way:
            mailbox, item = self._under_way.popleft()
            mailbox.put(item)
