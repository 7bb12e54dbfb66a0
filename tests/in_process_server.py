"""A real server in a thread of this process, so that a test can look inside."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.api.service import Service


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serves on a free port and gives the URL; stops afterwards."""
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
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    assert stopped.wait(30)
