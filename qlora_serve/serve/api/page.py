"""The page at `/`: hand-written files of this package, and nothing from elsewhere."""

from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_TYPES = {"css": "text/css", "js": "text/javascript"}
# The page loads its own files and asks its own server; it cannot be framed or send forms away.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _read() -> dict[str, str]:
    folder = files("qlora_serve.serve") / "web"
    return {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir()}


_FILES = _read()


@router.get("/")
async def page() -> HTMLResponse:
    """The page itself."""
    return HTMLResponse(_FILES["index.html"], headers=_HEADERS)


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Its style and scripts."""
    kind = _TYPES.get(name.rpartition(".")[2])
    if name not in _FILES or kind is None:
        raise HTTPException(404, "there is no such file")
    return Response(_FILES[name], media_type=kind, headers=_HEADERS)
