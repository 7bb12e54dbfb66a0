"""Who may come in: keys, scopes, and how often."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_serve.errors import ConfigError, RateLimitedError
from qlora_serve.serve.api.caller import CALLER, NOBODY, Caller, need_scope
from qlora_serve.serve.api.errors import error_body, rate_limited
from qlora_serve.serve.api.quota import Quota
from qlora_serve.serve.keys import KeyRecord, Role, hash_key, read_keys

log = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
"""What is the same for everybody and says nothing of adapters: no key is asked for."""
PAGE_FILES = "/page/"
"""The same of the page's own style and scripts."""
DOCS_FILES = "/docs/files/"
"""The same of those of the API's page."""


def require_scope(role: Role) -> Callable[[], Awaitable[None]]:
    """A route's dependency: the caller's key must have a scope, else 403."""

    async def check() -> None:
        need_scope(role)

    return check


class KeyRing:
    """The keys of a file, read again whenever it has changed.

    A file that went away or cannot be read any more changes nothing: a slip of the pen must not
    lock everybody out. It is logged, once for each state of the file.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: there is no such file, or it is not a keys file.
        """
        self._path = path
        self._seen = self._signature()
        self._records = read_keys(path)
        self._quotas: dict[str, Quota] = {}

    def __len__(self) -> int:
        """Keys in force."""
        return sum(record.revoked is None for record in self._records)

    def caller(self, key: str) -> Caller | None:
        """Who holds a key; None if nobody does."""
        self._look()
        digest = hash_key(key)
        found: KeyRecord | None = None
        for record in self._records:  # each one is compared, in a time that tells nothing
            if hmac.compare_digest(record.sha256, digest):
                found = record
        if found is None or found.revoked is not None:
            return None
        quota = self._quotas.get(found.id)
        if quota is None:
            quota = self._quotas[found.id] = Quota(found)
        elif quota.record is not found:
            quota.follow(found)
        return Caller(found.id, found, quota)

    def _look(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._records = read_keys(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
            return
        ids = {record.id for record in self._records}
        self._quotas = {key: quota for key, quota in self._quotas.items() if key in ids}
        log.info("the keys file has changed: %d keys in force", len(self))

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


class Access:
    """ASGI middleware: finds out who asks, before a byte of the body is read.

    Args:
        app: what comes behind.
        keys: the keys; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on in its caller's name, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._keys is not None and (
            path in PUBLIC_PATHS or path.startswith((PAGE_FILES, DOCS_FILES))
        ):
            await self._inside(NOBODY, scope, receive, send)
            return
        caller: Caller | None = Caller(scope["client"][0] if scope.get("client") else "")
        if self._keys is not None:
            caller = self._keys.caller(_bearer(scope))
        if caller is None:
            await _unauthenticated()(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if caller.quota is None:
            await self._inside(caller, scope, receive, send)
            return
        try:
            caller.quota.enter()
        except RateLimitedError as error:
            answer = rate_limited(error)
            answer.headers.update(caller.quota.headers())
            await answer(scope, receive, send)
            return
        place = _Place(send, caller.quota)
        try:
            await self._inside(caller, scope, receive, place.send)
        finally:
            place.leave()

    async def _inside(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        token = CALLER.set(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            CALLER.reset(token)


def _bearer(scope: Scope) -> str:
    """The key of an `Authorization: Bearer` header; empty when there is none."""
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, key = header.decode("latin-1").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _unauthenticated() -> JSONResponse:
    # The same words for no key, a wrong one and a revoked one.
    message = "this server wants a key that is in force, sent as `Authorization: Bearer KEY`"
    body = error_body(message, code="invalid_api_key")
    return JSONResponse(body, 401, {"www-authenticate": "Bearer"})


class _Place:
    """One request among those that a key has at once."""

    def __init__(self, send: Send, quota: Quota) -> None:
        self._send = send
        self._quota = quota
        self._is_held = True

    async def send(self, message: Message) -> None:
        """Adds what is left to the answer's head; the place is free before its last byte goes out,
        so that a client which asks one by one never meets itself."""
        if message["type"] == "http.response.start":
            left: list[Any] = [(k.encode(), v.encode()) for k, v in self._quota.headers().items()]
            message["headers"] = [*message["headers"], *left]
        elif not message.get("more_body", False):
            self.leave()
        await self._send(message)

    def leave(self) -> None:
        """Gives the place back, once."""
        if self._is_held:
            self._is_held = False
            self._quota.leave()
