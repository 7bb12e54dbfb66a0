"""A client that goes away frees its place, streaming or not."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
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
    begun, over = threading.Event(), threading.Event()
    seen: list[Sequence] = []
    ended: list[Sequence] = []
    engine = service.engine
    real_advance, real_end = engine._advance, engine._end

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
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": stream,
        "n": choices,
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
    assert engine.scheduler.sequences() == []
