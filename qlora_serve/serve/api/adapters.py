"""Adapters at run time: what there is, loading, unloading, pinning."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from qlora_serve.adapters.folder import check_name
from qlora_serve.errors import ConfigError, ForbiddenError, ForbiddenPathError, RequestError
from qlora_serve.serve.api.access import require_scope
from qlora_serve.serve.api.audit import audited
from qlora_serve.serve.api.caller import current_caller
from qlora_serve.serve.api.schemas import Scale
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.engine.registry import Registered
from qlora_serve.serve.engine.slots import Slot

router = APIRouter(tags=["adapters"])
_FOR_ADMINS = [Depends(require_scope("admin"))]


class LoadBody(BaseModel):
    """`POST /v1/adapters`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "tagging", "path": "adapters/tagging"}]},
        extra="forbid",
        use_attribute_docstrings=True,
    )

    name: str
    """The name to serve it under; an adapter of that name is replaced."""
    path: Path | None = None
    """Its directory, within --adapters-dir or an --adapter-root; the name's own directory in
    --adapters-dir when left out."""
    pin: bool = False
    """Keep it on the device."""


class ChangeBody(BaseModel):
    """`PATCH /v1/adapters/{name}`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"pin": True}]},
        extra="forbid",
        use_attribute_docstrings=True,
    )

    pin: bool | None = None
    """Keep it on the device, or let it go when there is need."""
    default_scale: Scale | None = None
    """The scale of requests that give none."""


class VllmLoadBody(BaseModel):
    """vLLM's `POST /v1/load_lora_adapter`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "tagging", "lora_path": "adapters/tagging"}]},
        extra="forbid",
    )

    lora_name: str = Field(min_length=1)
    lora_path: Path


class VllmUnloadBody(BaseModel):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"lora_name": "tagging"}]}, extra="forbid"
    )

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
    """vLLM's own number, by which nothing is known here."""


@router.get("/v1/adapters", summary="Every adapter, its state and where it is")
def list_adapters(request: Request) -> dict[str, Any]:
    """In order of name, with the memory that all take together, for keys that see all.

    Where its files are is told to admins only, who may change the list.
    """
    service = _service(request)
    service.adapters.sweep()  # what the last requests of an unloaded name have left
    slots = service.adapters.residency.slots()
    found: dict[str, Any] = {
        "object": "list",
        "data": [_card(service, entry, slots) for entry in service.entries()],
        "may_change": current_caller().has("admin"),
    }
    if current_caller().sees_all:  # what all take together tells of those that are hidden
        found["memory"] = {
            "device_bytes": service.adapters.residency.used,
            "device_capacity_bytes": service.adapters.residency.capacity,
            "host_bytes": service.adapters.host.used,
            "host_capacity_bytes": service.adapters.host.capacity,
        }
    return found


@router.get("/v1/adapters/{name}", summary="One adapter")
def show_adapter(name: str, request: Request) -> dict[str, Any]:
    """404 lists the known names."""
    service = _service(request)
    entry = service.entry(name)
    return _card(service, entry, service.adapters.residency.slots())


@router.post("/v1/adapters", summary="Load or replace an adapter", dependencies=_FOR_ADMINS)
async def load_adapter(body: LoadBody, request: Request) -> dict[str, Any]:
    """Answers when it is ready; requests in flight keep what they started with."""
    return await run_in_threadpool(_load, _service(request), body)


@router.delete("/v1/adapters/{name}", summary="Unload an adapter", dependencies=_FOR_ADMINS)
def unload_adapter(name: str, request: Request) -> dict[str, Any]:
    """Requests in flight keep it until they end. Its files stay where they are."""
    _unload(_service(request), name)
    return {"id": name, "object": "adapter", "deleted": True}


@router.patch(
    "/v1/adapters/{name}",
    summary="Pin an adapter, or change its default scale",
    dependencies=_FOR_ADMINS,
)
def change_adapter(name: str, body: ChangeBody, request: Request) -> dict[str, Any]:
    """What is left out stays as it is."""
    service = _service(request)
    with audited("change", name, pin=body.pin, default_scale=body.default_scale):
        service.entry(name)  # known to the caller
        entry = service.adapters.update(name, body.pin, body.default_scale)
    return _card(service, entry, service.adapters.residency.slots())


@router.post(
    "/v1/load_lora_adapter",
    summary="Load an adapter, as vLLM's route does",
    dependencies=_FOR_ADMINS,
)
async def load_lora_adapter(body: VllmLoadBody, request: Request) -> PlainTextResponse:
    """Refuses a name that is taken."""
    service = _service(request)
    if any(entry.name == body.lora_name and entry.content for entry in service.entries()):
        raise RequestError(
            f"the adapter {body.lora_name!r} has already been loaded; unload it first, or replace "
            "it with POST /v1/adapters",
            param="lora_name",
        )
    await run_in_threadpool(_load, service, LoadBody(name=body.lora_name, path=body.lora_path))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    summary="Unload an adapter, as vLLM's route does",
    dependencies=_FOR_ADMINS,
)
def unload_lora_adapter(body: VllmUnloadBody, request: Request) -> PlainTextResponse:
    """404 lists the known names."""
    if body.lora_int_id is not None:
        raise RequestError(
            "lora_int_id is not supported; name the adapter by lora_name", param="lora_int_id"
        )
    _unload(_service(request), body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _load(service: Service, body: LoadBody) -> dict[str, Any]:
    with audited("load", body.name, path=body.path, pin=body.pin):
        try:
            check_name(body.name)
        except ConfigError as error:
            raise RequestError(str(error), param="name") from None
        if body.name in service.reserved_names:
            raise RequestError(f"{body.name!r} means the base; choose another name", param="name")
        _need_manageable(body.name)
        if body.name in service.feedback.experiments:
            raise RequestError(
                f"{body.name!r} means an experiment; choose another name", param="name"
            )
        path = allowed_path(service, body)
        service.adapters.load(body.name, path, body.pin)
    service.adapters.sweep()
    entry = service.adapters.entry(body.name)
    return _card(service, entry, service.adapters.residency.slots())


def _unload(service: Service, name: str) -> None:
    with audited("unload", name):
        service.entry(name)  # known to the caller
        service.adapters.unload(name)


def _need_manageable(name: str) -> None:
    """Refuses names that the caller's key may not use, whether there is such an adapter or not."""
    caller = current_caller()
    if caller.record is not None and not caller.allows(name):
        patterns = ", ".join(caller.record.adapters) or "none"
        raise ForbiddenError(f"this key may load adapters named like {patterns}, not {name!r}")


def allowed_path(service: Service, body: LoadBody) -> Path:
    """The directory that a body means, if this server may read it.

    Raises:
        RequestError: no path was given, and there is no folder to look in.
        ForbiddenPathError: it is in none of the allowed folders; links do not lead out of them.
    """
    folder = None if service.folder is None else service.folder.path
    if body.path is None and folder is None:
        raise RequestError("path: give the adapter's directory", param="path")
    roots = [*service.roots, *([folder.resolve()] if folder is not None else [])]
    if not roots:
        raise ForbiddenPathError(
            "this server loads no adapters at run time; start it with --adapter-root or "
            "--adapters-dir"
        )
    path = body.path
    if path is None:
        assert folder is not None
        path = folder / body.name
    resolved = path.resolve()
    root = next((root for root in roots if resolved.is_relative_to(root)), None)
    if root is None:
        listed = ", ".join(map(str, roots))
        raise ForbiddenPathError(
            f"{path} is outside the folders that adapters may be loaded from: {listed}"
        )
    # Else a key could read another one's adapter by giving it a name of its own.
    if not current_caller().sees_all:
        _need_manageable(next(iter(resolved.relative_to(root).parts), ""))
    return path


def _card(service: Service, entry: Registered, slots: list[Slot]) -> dict[str, Any]:
    content = entry.content
    mine = [s for s in slots if content is not None and s.key[0] == content.identity]
    failed = content is None or bool(entry.load_error)
    states = {slot.state for slot in mine}
    if "resident" in states:
        tier = "device"
    else:
        in_host = content is not None and content.identity in service.adapters.host
        tier = "host" if in_host else "disk"
    loading = "loading" if "loading" in states else "ready"
    return {
        "id": entry.name,
        "object": "adapter",
        "identity": content.identity if content else None,
        "path": str(entry.path) if current_caller().has("admin") else None,
        "state": "failed" if failed else loading,
        "reason": entry.load_error or entry.reason or None,
        "tier": None if content is None else tier,
        "kind": content.kind if content else None,
        "rank": content.rank if content else None,
        "size_bytes": max((s.size for s in mine if s.state == "resident"), default=content.size)
        if content
        else None,
        "pinned": entry.is_pinned,
        "default_scale": entry.default_scale,
        "requests_in_flight": len({s for slot in mine for s in slot.selections}),
    }
