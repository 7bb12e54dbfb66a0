"""A client that goes away frees its place within one step, streaming or not."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from in_process_server import serving
from tiny_models import write_tiny_model

from qlora_serve.serve.api.service import Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.request import Sequence
from qlora_serve.serve.run import build_service


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Service, str]]:
    base = write_tiny_model(tmp_path / "tiny")
    service = build_service(ServeSettings(base=str(base), max_sequences=1))
    with serving(service) as url:
        yield service, f"{url}/v1/chat/completions"


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_the_request_and_all_its_choices(served, stream, choices) -> None:
    service, url = served
    begun, left, noticed, over = (threading.Event() for _ in range(4))
    seen: list[Sequence] = []
    ended: list[Sequence] = []
    aborted: set[str] = set()
    steps_after: list[int] = []
    engine = service.engine
    real_advance, real_end = engine._advance, engine._end
    real_step, real_abort = engine.step, engine.abort

    def abort(request_id: str) -> None:
        real_abort(request_id)
        aborted.add(request_id)
        if len(aborted) == choices:
            noticed.set()

    def step() -> bool:
        """Once the client has left, no step begins before the engine has been told: noticing needs
        none. Then those are counted that still compute for it."""
        if left.is_set() and not over.is_set():
            assert noticed.wait(60)
            steps_after.append(len(engine.scheduler.sequences()))
        return real_step()

    def advance(sequence: Sequence, token: int) -> None:
        real_advance(sequence, token)
        seen.append(sequence)
        begun.set()

    def end(sequence: Sequence, ending) -> None:
        real_end(sequence, ending)
        ended.append(sequence)
        if len(ended) == choices:
            over.set()

    engine._advance, engine._end = advance, end
    engine.step, engine.abort = step, abort
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": stream,
        "n": choices,
    }

    # A bare connection is closed when the answer has begun, however long that takes.
    content = json.dumps(body).encode()
    head = f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert begun.wait(60)
        left.set()
    assert over.wait(60)
    # The one that was about to begin when the word came, if any.
    assert [there for there in steps_after if there] in ([], [choices])
    assert len(seen[0].generated) < 480
    assert engine.scheduler.sequences() == []
