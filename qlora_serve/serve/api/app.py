"""The FastAPI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from qlora_serve import __version__
from qlora_serve.serve.api import (
    adapters,
    chat,
    compare,
    completions,
    errors,
    experiments,
    feedback,
    page,
    responses,
    tokens,
)
from qlora_serve.serve.api.access import DOCS_FILES, Access, require_scope
from qlora_serve.serve.api.answers import ERRORS, ModelCard, ModelList, StatusAnswer
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.door import Door
from qlora_serve.serve.api.service import Service

_READABLE = [
    "x-request-id", "retry-after", "x-experiment", "x-experiment-variant",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset")
      for of in ("requests", "tokens")),
]  # fmt: skip
"""Headers that pages of other origins may read, where they may call at all."""


def create_app(service: Service) -> FastAPI:
    """The application that serves `service`, which it starts and closes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    # FastAPI's own /docs is blank where the browser reaches no CDN; this one brings its scripts.
    app = FastAPIOffline(
        static_url=DOCS_FILES.removesuffix("/"),
        redoc_url=None,  # which asks elsewhere for fonts
        title="qlora-serve",
        version=__version__,
        summary="One base model, many adapters, chosen per request.",
        lifespan=lifespan,
        responses=ERRORS,
        # For the interactive page: what checks the key is `Access`.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if service.keys is not None else [],
    )
    app.state.service = service
    app.add_middleware(Access, keys=service.keys)
    app.add_middleware(Door, limits=service.limits)
    if service.limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.limits.cors_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=_READABLE,
        )
    errors.install(app)
    app.include_router(adapters.router)  # which says itself what is for admins
    app.include_router(experiments.router)
    app.include_router(feedback.router)
    app.include_router(page.router)  # which is the same for everybody
    for module in (chat, compare, completions, responses, tokens):
        app.include_router(module.router, dependencies=[Depends(require_scope("infer"))])
    _add_models(app, service)
    _add_health(app, service)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    def card(
        name: str, parent: str | None, experiment: dict[str, float] | None = None
    ) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=service.started,
            owned_by="qlora-serve",
            root=service.base_name,
            parent=parent,
            experiment=experiment,
        )

    @app.get("/v1/models", tags=["models"], summary="The base, every adapter and every experiment")
    async def models() -> ModelList:
        """The base first, then adapters and experiments, whose `parent` is the base."""
        cards = [card(service.base_name, None)] if current_caller().may_use_base else []
        usable = [entry.name for entry in service.entries() if entry.content is not None]
        cards += [card(name, service.base_name) for name in usable]
        cards += [
            card(one.name, service.base_name, dict(one.shares)) for one in service.experiments()
        ]
        return ModelList(object="list", data=cards)

    @app.get("/v1/models/{name:path}", tags=["models"], summary="One model")
    async def model(name: str) -> ModelCard:
        """The base, an adapter or an experiment; 404 lists the known names."""
        experiment = service.experiment(name)
        if experiment is not None:
            return card(name, service.base_name, dict(experiment.shares))
        adapter = service.choose(name, None)
        return card(adapter.name if adapter else service.base_name,
                    service.base_name if adapter else None)  # fmt: skip


def _add_health(app: FastAPI, service: Service) -> None:
    states: dict[int | str, dict[str, Any]] = {
        200: {"model": StatusAnswer},
        503: {"model": StatusAnswer, "description": "It does not, and why"},
    }

    def state(word: str) -> JSONResponse:
        if service.engine.is_alive:
            return JSONResponse({"status": word})
        return JSONResponse({"status": "the engine does not run"}, 503)

    @app.get(
        "/health",
        tags=["health"],
        summary="Is the process alive?",
        response_model=None,
        responses=states,
    )
    async def health() -> JSONResponse:
        """200 while the engine's thread runs."""
        return state("alive")

    @app.get(
        "/ready",
        tags=["health"],
        summary="Does it take traffic?",
        response_model=None,
        responses=states,
    )
    async def ready() -> JSONResponse:
        """200 once base and adapters are loaded and requests are taken."""
        if service.traffic.is_draining:
            return JSONResponse({"status": "the server is shutting down"}, 503)
        return state("ready")

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Counters for Prometheus",
        response_class=PlainTextResponse,
    )
    async def metrics() -> PlainTextResponse:
        """Requests, tokens, latencies and the cache, by adapter; for keys, of their own ones."""
        caller = current_caller()
        page = service.metrics.page(None if caller.sees_all else caller)
        return PlainTextResponse(page, media_type=CONTENT_TYPE_LATEST)
