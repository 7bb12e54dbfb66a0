"""What streaming costs: processor time of the server's event loop for each token.

    python benchmarks/streaming.py                 # 1, 8 and 32 streams at once
    python benchmarks/streaming.py --profile       # and where it goes

A tiny random model in this process, clients in another; the loop's thread is timed by its own
clock, so that neither the engine nor the machine's other work is in the figures.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
_TOKENS = 400
_CLIENT = """
import asyncio, json, sys, httpx
async def main(url, body, count):
    async with httpx.AsyncClient(timeout=300, trust_env=False) as http:
        async def one():
            found = b""
            async with http.stream("POST", url + "/v1/chat/completions", json=body) as answer:
                async for piece in answer.aiter_raw():
                    found += piece
            assert found.endswith(b"data: [DONE]\\n\\n"), found[-200:]
            return found.count(b"data: ")
        print(sum(await asyncio.gather(*(one() for _ in range(count)))))
asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder), options.rounds, options.profile)


def _measure(folder: Path, rounds: int, profiles: bool) -> None:
    import uvicorn
    from tiny_models import write_tiny_model

    from qlora_serve.serve.api.app import create_app
    from qlora_serve.serve.config import ServeSettings
    from qlora_serve.serve.run import build_service

    base = write_tiny_model(folder / "tiny")
    service = build_service(ServeSettings(base=str(base), dtype="float32"))
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    body = {
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": _TOKENS, "stream": True,
        "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    _ask(url, body, 2)
    profile = cProfile.Profile()
    for count in (1, 8, 32):
        costs = []
        for _ in range(rounds):
            before = _on(loops[0], time.thread_time)
            if profiles and count == 8:
                _on(loops[0], profile.enable)
            chunks = _ask(url, body, count)
            if profiles and count == 8:
                _on(loops[0], profile.disable)
            costs.append((_on(loops[0], time.thread_time) - before) / (count * _TOKENS) * 1e6)
        print(f"{count} streams: {min(costs):.0f} us of the loop's time a token, {chunks} events")
    if profiles:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    server.should_exit = True
    thread.join()


def _on(loop: asyncio.AbstractEventLoop, work: Any) -> Any:
    async def run() -> Any:
        return work()

    return asyncio.run_coroutine_threadsafe(run(), loop).result()


def _ask(url: str, body: dict[str, Any], count: int) -> int:
    command = [sys.executable, "-c", _CLIENT, url, json.dumps(body), str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
