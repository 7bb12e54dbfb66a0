"""Server-sent events: all that are ready go out in one piece."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PING_SECONDS = 15.0
"""After so long without an event a comment is sent, so that nothing between takes it for dead."""

json_text: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode
"""A text as JSON."""
Data = str | dict[str, str]
"""An event's data, or its `event` and `data`."""


class EventStream(Response):
    """Sends what a generator gives; closes the generator early when the client goes away.

    Args:
        events: lists of the events that are ready.
        headers: further ones.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Iterable[Data], None], headers: dict[str, str] | None = None
    ) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        # Proxies must neither keep nor collect what is to be read at once.
        self.init_headers(
            {"cache-control": "no-store", "x-accel-buffering": "no"} | (headers or {})
        )

    def render(self, content: Any) -> bytes:
        """There is no body beforehand."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends head and events."""
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        try:
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
            pulse = _Pulse(send)
            try:
                async for events in self._events:
                    text = "".join(map(written, events))
                    if text:
                        await pulse.send(text.encode())
            finally:
                pulse.stop()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


class _Pulse:
    """Sends pieces, and a comment whenever nothing was sent for long."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._latest = self._loop.time()
        self._is_sending = False
        self._beating = asyncio.create_task(self._beat())

    async def send(self, body: bytes) -> None:
        """Sends a piece."""
        self._latest = self._loop.time()
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_sending = False

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(max(0.1, self._latest + _PING_SECONDS - self._loop.time()))
            # One who reads slowly has enough to read.
            if not self._is_sending and self._loop.time() >= self._latest + _PING_SECONDS:
                await self.send(b": ping\n\n")

    def stop(self) -> None:
        """No more comments."""
        self._beating.cancel()


def written(data: Data) -> str:
    """An event as it is sent. JSON holds no line breaks, so that its data are one line."""
    if isinstance(data, str):
        return f"data: {data}\n\n"
    return f"event: {data['event']}\ndata: {data['data']}\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
