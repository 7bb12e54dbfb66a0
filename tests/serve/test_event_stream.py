"""How events go out: together, with a sign of life between, and ended when the client goes."""

import asyncio
from typing import Any

import pytest

from qlora_serve.serve.api import event_stream
from qlora_serve.serve.api.courier import Courier, Mailbox
from qlora_serve.serve.api.event_stream import EventStream


async def _never() -> dict[str, Any]:
    return await asyncio.get_running_loop().create_future()


def test_what_is_ready_is_one_piece() -> None:
    async def events():
        yield ["a", "b", {"event": "x", "data": "{}"}]
        yield []
        yield ["[DONE]"]

    sent: list[dict[str, Any]] = []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(EventStream(events(), {"x-more": "1"})({"type": "http"}, _never, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert (headers[b"cache-control"], headers[b"x-more"]) == (b"no-store", b"1")
    assert b"content-length" not in headers
    assert [message["body"] for message in sent[1:]] == [
        b"data: a\n\ndata: b\n\nevent: x\ndata: {}\n\n", b"data: [DONE]\n\n", b"",
    ]  # fmt: skip
    assert [message["more_body"] for message in sent[1:]] == [True, True, False]


def test_a_silent_stream_shows_that_it_lives(monkeypatch) -> None:
    monkeypatch.setattr(event_stream, "_PING_SECONDS", 0.01)

    async def run() -> list[bytes]:
        pinged = asyncio.Event()
        bodies: list[bytes] = []

        async def events():
            await pinged.wait()
            yield ["late"]

        async def send(message) -> None:
            bodies.append(message.get("body", b""))
            if bodies[-1] == b": ping\n\n":
                pinged.set()

        await EventStream(events())({"type": "http"}, _never, send)
        return bodies

    bodies = asyncio.run(run())
    assert bodies[1] == b": ping\n\n"
    assert bodies[-2:] == [b"data: late\n\n", b""]


@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_client_that_goes_ends_the_generator(is_blocked) -> None:
    ended = []

    async def run() -> None:
        going = asyncio.Event()

        async def events():
            try:
                yield ["first"]
                await _never()
            finally:
                ended.append(True)

        async def send(message) -> None:
            if message.get("body"):
                going.set()
                if is_blocked:  # one who reads nothing
                    await _never()

        async def receive() -> dict[str, Any]:
            await going.wait()
            return {"type": "http.disconnect"}

        await EventStream(events())({"type": "http"}, receive, send)

    asyncio.run(run())
    assert ended == [True]


def test_everything_arrives_once_and_in_order_from_another_thread() -> None:
    async def run() -> tuple[list[int], list[int]]:
        courier, loop = Courier(), asyncio.get_running_loop()
        boxes = Mailbox(), Mailbox()

        def work() -> None:
            for number in range(20_000):
                courier.send(loop, boxes[number % 2], number)

        sending = asyncio.create_task(asyncio.to_thread(work))
        found: tuple[list[int], list[int]] = ([], [])
        for box, mine in zip(boxes, found, strict=True):
            while len(mine) < 10_000:
                mine += await box.take()
        await sending
        return found

    even, odd = asyncio.run(run())
    assert even == list(range(0, 20_000, 2))
    assert odd == list(range(1, 20_000, 2))
