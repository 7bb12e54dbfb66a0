"""Signals and a broken engine end the server, and never an answer without an ending."""

import asyncio
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from server_process import _LISTENING
from tool_bases import write_tool_base

from qlora_serve.errors import EngineStoppedError
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import _listen, build_service
from qlora_serve.serve.shutdown import run_until_told


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tool_base(tmp_path_factory.mktemp("shutdown") / "tiny", "hermes")


@contextmanager
def _server(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "qlora_serve.cli", "serve", *map(str, arguments)]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := _LISTENING.search(line)))
        yield process, url
    finally:
        process.kill()
        process.communicate(timeout=60)


def _until_not_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/ready").status_code == 503:
            return
    raise AssertionError("still ready")


@contextmanager
def _running_answer(url: str, tokens: int) -> Iterator[Iterator[str]]:
    """A stream that has begun."""
    body = {"prompt": "hello", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert "text_completion" in next(lines)
        yield lines


def test_sigterm_refuses_the_new_and_lets_the_running_finish(base) -> None:
    with _server(base) as (process, url):
        with _running_answer(url, 1500) as lines:
            process.send_signal(signal.SIGTERM)
            _until_not_ready(url)
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            assert httpx.get(f"{url}/health").status_code == 200
            rest = list(lines)
        assert '"finish_reason": "length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0


def test_what_does_not_finish_in_time_ends_with_an_error(base) -> None:
    with _server(base, "--drain-timeout", "0") as (process, url):
        with _running_answer(url, 3900) as lines:
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "the server is shutting down" in rest[-1]
        assert process.wait(timeout=60) == 0


def test_a_second_sigterm_ends_now(base) -> None:
    with (
        _server(base, "--drain-timeout", "600") as (process, url),
        _running_answer(url, 3900),
    ):
        process.send_signal(signal.SIGTERM)
        _until_not_ready(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_broken_engine_ends_the_server_with_the_reason(base) -> None:
    service = build_service(ServeSettings(base=str(base)))
    listener = _listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    raised: list[BaseException] = []

    def run() -> None:
        try:
            run_until_told(create_app(service), service, listener, 1.0)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert httpx.get(f"{url}/health").status_code == 200

    def broken() -> None:
        raise MemoryError("no room")

    service.engine.scheduler.schedule = broken
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 503
    assert "the engine broke down" in answer.json()["error"]["message"]
    thread.join(60)
    assert not thread.is_alive()
    [error] = raised
    assert isinstance(error, EngineStoppedError)
    assert "MemoryError('no room')" in str(error)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes another process's memory away")
def test_a_server_without_memory_for_one_more_thread_still_ends(base) -> None:
    with _server(base) as (process, url):
        assert httpx.get(f"{url}/ready").status_code == 200
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 1_000_000
        _, most = resource.prlimit(process.pid, resource.RLIMIT_AS)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, most))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_the_pieces_of_an_answer_do_not_wait_for_the_client_to_confirm_the_first() -> None:
    """asyncio's own choice is asked for: what it does on sockets that it accepts."""

    async def accepted() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held = writer.get_extra_info("socket")
            seen.set_result(held.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                answer = await seen
                writer.close()
        return answer

    assert asyncio.run(accepted()) == 1
