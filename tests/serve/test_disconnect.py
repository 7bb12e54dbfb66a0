"""A client that goes away frees its place, streaming or not."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from tiny_models import write_tiny_model

from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.request import Sequence
from qlora_serve.serve.run import build_service


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Service, str]]:
    base = write_tiny_model(tmp_path / "tiny")
    service = build_service(ServeSettings(base=str(base), max_sequences=1))
    started, stopped = threading.Event(), threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))

    def run() -> None:
        server.run()
        stopped.set()

    threading.Thread(target=run, daemon=True).start()
    assert started.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield service, f"http://127.0.0.1:{port}/v1/chat/completions"
    server.should_exit = True
    assert stopped.wait(30)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_the_request(served, stream) -> None:
    service, url = served
    begun, over = threading.Event(), threading.Event()
    seen: list[Sequence] = []
    engine = service.engine
    real_advance, real_end = engine._advance, engine._end

    def advance(sequence: Sequence, token: int) -> None:
        real_advance(sequence, token)
        seen.append(sequence)
        begun.set()

    def end(sequence: Sequence, ending) -> None:
        real_end(sequence, ending)
        over.set()

    engine._advance, engine._end = advance, end
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": stream,
    }

    def ask_and_leave() -> None:
        # The read limit makes the client close its connection in the middle of the answer.
        timeout = httpx.Timeout(30, read=0.05)
        try:
            with httpx.stream("POST", url, json=body, timeout=timeout) as response:
                for _ in response.iter_raw():
                    if begun.wait(30):
                        return
        except httpx.ReadTimeout:
            assert begun.wait(30)

    ask_and_leave()
    assert over.wait(30)
    assert len(seen[0].generated) < 480
    assert engine.scheduler.running == 0
