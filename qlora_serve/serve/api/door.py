"""What every HTTP request passes first: its id, the size of its body, how many there are."""

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_serve.serve.api.errors import error_body
from qlora_serve.serve.api.limits import ApiLimits

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:/+=-]{1,128}")
_RETRY_SECONDS = "1"


class Door:
    """ASGI middleware: `x-request-id`, the cap on bodies, the cap on requests at once."""

    def __init__(self, app: ASGIApp, limits: ApiLimits) -> None:
        self._app = app
        self._limits = limits
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        # Questions after health and metrics are answered however busy the server is.
        counts = scope["method"] == "POST"
        self._inside += counts
        try:
            await self._app(scope, self._counted(receive), send_with_id)
        finally:
            self._inside -= counts

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return JSONResponse(error_body(self._too_large()), 413)
        if scope["method"] == "POST" and self._inside >= self._limits.concurrent:
            message = f"this server answers {self._limits.concurrent} requests at once; try again"
            return JSONResponse(
                error_body(message, "server_error", code="overloaded"),
                503,
                {"retry-after": _RETRY_SECONDS},
            )
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Bodies that do not say how long they are are counted as they come."""
        taken = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limits.body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than the {self._limits.body_bytes} bytes that this server takes"


def _request_id(scope: Scope) -> bytes:
    """The caller's own id when it is harmless, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()
