"""The one place where errors become HTTP answers, in OpenAI's shape."""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qlora_serve.errors import (
    AdapterError,
    EngineStoppedError,
    FeedbackError,
    FeedbackUnavailableError,
    ForbiddenError,
    ForbiddenPathError,
    OverloadedError,
    QloraServeError,
    RateLimitedError,
    RequestError,
    RequestTimeoutError,
    UnknownAdapterError,
)

log = logging.getLogger(__name__)

_UNUSABLE = "adapter_unusable"
_RETRY_SECONDS = "1"
_NOT_AN_OBJECT = ("missing", "model_attributes_type", "model_type", "dict_type")


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict[str, Any]:
    """An error as the openai client reads it."""
    # A message may quote half a surrogate pair from the body, which no answer can carry.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def rate_limited(error: RateLimitedError) -> JSONResponse:
    """429, and when to come again."""
    seconds = max(1, math.ceil(error.retry_after))
    message = f"{error}; try again in {seconds} s"
    return JSONResponse(
        error_body(message, error.kind, code=error.code), 429, {"retry-after": str(seconds)}
    )


def install(app: FastAPI) -> None:
    """Registers the translations."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(QloraServeError, _domain)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    messages = []
    param = None
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part != "body")
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "this field is not supported"
        if item["type"] == "json_invalid":
            where, message = "", f"the body is not JSON: {item.get('ctx', {}).get('error', '')}"
        if tuple(item["loc"]) == ("body",) and item["type"] in _NOT_AN_OBJECT:
            message = "expected a JSON object, sent with the header Content-Type: application/json"
        named = item.get("ctx", {}).get("param") if item["type"] == "refused" else None
        param = param or where or named
        messages.append(f"{where}: {message}" if where else message)
    return JSONResponse(error_body("; ".join(messages), param=param), 400)


async def _domain(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UnknownAdapterError):
        return JSONResponse(
            error_body(str(error), "not_found_error", "model", "model_not_found"), 404
        )
    if isinstance(error, ForbiddenPathError):
        return JSONResponse(error_body(str(error), "permission_error", "path"), 403)
    if isinstance(error, ForbiddenError):
        return JSONResponse(
            error_body(str(error), "permission_error", code="insufficient_permissions"), 403
        )
    if isinstance(error, RateLimitedError):
        return rate_limited(error)
    if isinstance(error, AdapterError):
        # Not a 5xx: asking again does not mend it.
        return JSONResponse(error_body(str(error), "adapter_error", "adapter", _UNUSABLE), 422)
    if isinstance(error, EngineStoppedError | FeedbackUnavailableError):
        return JSONResponse(error_body(str(error), "server_error"), 503)
    if isinstance(error, OverloadedError | RequestTimeoutError):
        body = error_body(str(error), "server_error", code="overloaded")
        return JSONResponse(body, 503, {"retry-after": _RETRY_SECONDS})
    if isinstance(error, FeedbackError) and error.is_unknown:
        return JSONResponse(error_body(str(error), "not_found_error", error.param), 404)
    if isinstance(error, RequestError):
        return JSONResponse(error_body(str(error), param=error.param), 400)
    log.error("unexpected domain error", exc_info=error)
    return JSONResponse(error_body(str(error), "server_error"), 500)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, kind), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body("internal error", "server_error"), 500)
