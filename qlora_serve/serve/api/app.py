"""The FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from qlora_serve import __version__
from qlora_serve.serve.api import adapters, chat, errors
from qlora_serve.serve.api.service import Service


def create_app(service: Service) -> FastAPI:
    """The application that serves `service`, which it starts and closes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="qlora-serve",
        version=__version__,
        summary="One base model, many adapters, chosen per request.",
        lifespan=lifespan,
    )
    app.state.service = service
    errors.install(app)
    app.include_router(chat.router)
    app.include_router(adapters.router)
    _add_models(app, service)
    _add_health(app, service)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "qlora-serve",
            "root": service.base_name,
            "parent": parent,
        }

    @app.get("/v1/models", tags=["models"], summary="The base and every adapter")
    async def models() -> dict[str, Any]:
        """Lists the base first; an adapter's `parent` is the base."""
        cards = [card(service.base_name, None)]
        cards += [card(name, service.base_name) for name in service.adapters.names()]
        return {"object": "list", "data": cards}

    @app.get("/v1/models/{name:path}", tags=["models"], summary="One model")
    async def model(name: str) -> dict[str, Any]:
        """The base or one adapter; 404 lists the known names."""
        adapter = service.choose(name, None)
        return card(adapter.name if adapter else service.base_name,
                    service.base_name if adapter else None)  # fmt: skip


def _add_health(app: FastAPI, service: Service) -> None:
    def state(request: Request, word: str) -> JSONResponse:
        if service.engine.is_alive:
            return JSONResponse({"status": word})
        return JSONResponse({"status": "the engine does not run"}, 503)

    @app.get("/health", tags=["health"], summary="Is the process alive?", response_model=None)
    async def health(request: Request) -> JSONResponse:
        """200 while the engine's thread runs."""
        return state(request, "alive")

    @app.get("/ready", tags=["health"], summary="Does it take traffic?", response_model=None)
    async def ready(request: Request) -> JSONResponse:
        """200 once base and adapters are loaded and requests are taken."""
        return state(request, "ready")
