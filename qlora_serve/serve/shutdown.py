"""Running the HTTP server until a signal or a broken engine ends it, without losing an answer."""

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qlora_serve.errors import EngineStoppedError
from qlora_serve.serve.api.service import Service

log = logging.getLogger(__name__)

_LAST_BYTES_SECONDS = 5
"""How long clients have to take the last events, once nothing is generated any more."""
_LOOK_SECONDS = 0.1
_KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open. uvicorn's 5 s are also what httpx, and with it the
openai client, keeps one for: a request that is sent just then meets a closed door."""


def run_until_told(
    app: FastAPI, service: Service, listener: socket.socket, drain_timeout: float
) -> None:
    """Serves until SIGTERM or SIGINT, or until the engine breaks down.

    After the first signal the server is not ready and refuses new requests, while those in flight
    may finish for `drain_timeout` seconds; the rest end with an error. A second signal ends now.

    Raises:
        EngineStoppedError: the engine broke down; with the reason.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    _Server(config, service, drain_timeout).run(sockets=[listener])
    if service.engine.failure is not None:
        raise EngineStoppedError(f"the engine broke down: {service.engine.failure!r}")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_timeout = drain_timeout
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Counts signals; what they mean is done on the event loop.

        uvicorn's own would raise the signal again at the end, and the exit code would not be 0.
        """
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self._service.engine.failure is not None:
            return True
        if self._signals and self._draining is None:
            log.info("draining: %d answers on their way", self._service.traffic.live)
            self._service.traffic.is_draining = True
            self._draining = asyncio.create_task(self._drain())
        if self._signals > 1:
            self.force_exit = True
            self._service.close()  # fails what runs; uvicorn's own shutdown skips it now
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the app also where uvicorn, told to hurry, would cancel it and log a traceback."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_timeout
        while self._service.traffic.live and loop.time() < until:
            await asyncio.sleep(_LOOK_SECONDS)
        # Whatever is left gets its error from the engine's end, which comes after its step. Not in
        # another thread: there may be no memory for one, and asyncio would want one more to end.
        self._service.engine.stop()
        self.should_exit = True
