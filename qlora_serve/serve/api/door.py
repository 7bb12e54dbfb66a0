"""What every HTTP request passes first: its id, the size of its body, how many there are."""

import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_serve.serve.api.caller import REQUEST_ID
from qlora_serve.serve.api.errors import error_body
from qlora_serve.serve.api.limits import ApiLimits

log = logging.getLogger("qlora_serve.requests")

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
        status, began = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
            return
        # Questions after health and metrics are answered however busy the server is.
        counts = scope["method"] == "POST"
        self._inside += counts
        token = REQUEST_ID.set(request_id.decode())
        try:
            await self._app(scope, self._counted(receive), send_with_id)
        finally:
            _log(scope, status, time.perf_counter() - began)
            REQUEST_ID.reset(token)
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


def _log(scope: Scope, status: int, seconds: float) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    caller = scope.get("state", {}).get("caller")
    # Without the query, where some clients put what should not be read by others.
    fields = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        "request_id": REQUEST_ID.get(),
        "key": caller.record.id if caller is not None and caller.record is not None else None,
    }
    log.info("%s %s %d", scope["method"], scope["path"], status, extra={"fields": fields})
