"""An adapter that a key may not use is refused by the same work as one that does not exist."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_models import write_random_adapter, write_tiny_model

import qlora_serve
from qlora_serve.serve.api.app import create_app
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.feedback.store import Answered
from qlora_serve.serve.keys import add_key
from qlora_serve.serve.run import build_service

PACKAGE = str(Path(qlora_serve.__file__).parent)
MESSAGES = [{"role": "user", "content": "x"}]
HIDDEN, ABSENT, WARM = "hidden", "absent", "warmup"
Ask = Callable[[str], dict[str, Any]]
ROUTES: dict[str, tuple[str, str, Ask]] = {
    "chat": ("POST", "/v1/chat/completions", lambda n: {"model": n, "messages": MESSAGES}),
    "stream": (
        "POST", "/v1/chat/completions", lambda n: {"model": n, "messages": MESSAGES, "stream": True}
    ),
    "adapter": (
        "POST", "/v1/chat/completions", lambda n: {"adapter": n, "messages": MESSAGES}
    ),
    "composition": (
        "POST", "/v1/chat/completions",
        lambda n: {"adapter": [{"name": "own"}, {"name": n}], "messages": MESSAGES},
    ),
    "scaled": (
        "POST", "/v1/completions", lambda n: {"adapter": n, "adapter_scale": 2, "prompt": "x"}
    ),
    "responses": ("POST", "/v1/responses", lambda n: {"model": n, "input": "x"}),
    "compare": (
        "POST", "/v1/compare", lambda n: {"messages": MESSAGES, "variants": ["base", n]}
    ),
    "tokenize": ("POST", "/tokenize", lambda n: {"model": n, "prompt": "x"}),
    "detokenize": ("POST", "/detokenize", lambda n: {"model": n, "tokens": [1]}),
    "model": ("GET", "/v1/models/NAME", lambda n: {}),
    "card": ("GET", "/v1/adapters/NAME", lambda n: {}),
    "unload": ("DELETE", "/v1/adapters/NAME", lambda n: {}),
    "change": ("PATCH", "/v1/adapters/NAME", lambda n: {"pin": True}),
    "load": ("POST", "/v1/adapters", lambda n: {"name": n, "path": "/nowhere"}),
    "peers-unload": ("POST", "/v1/unload_lora_adapter", lambda n: {"lora_name": n}),
    "experiment": ("GET", "/v1/experiments/NAME", lambda n: {}),
    "end-experiment": ("DELETE", "/v1/experiments/NAME", lambda n: {}),
}  # fmt: skip


class Watched(dict):
    """A dictionary whose every look-up is noted: a subscript is no call that a profiler sees."""

    def __init__(self, content: dict[str, Any], noted: list[str]) -> None:
        super().__init__(content)
        self._noted = noted

    def get(self, key: str, default: Any = None) -> Any:
        self._noted.append("look-up")
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._noted.append("look-up")
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._noted.append("look-up")
        return super().__contains__(key)


class Work:
    """What the package does: its functions in order, what they call of C, and look-ups of names."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def profile(self, frame: Any, event: str, what: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            self.noted.append(code.co_qualname)
        elif event == "c_call":
            self.noted.append(f"{code.co_qualname}: {what.__qualname__}")


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[tuple[Any, Work, str]]:
    folder = tmp_path_factory.mktemp("hidden")
    base = write_tiny_model(folder / "tiny")
    for number, name in enumerate(("own", HIDDEN)):
        write_random_adapter(folder / "adapters" / name, base, seed=number)
    key, _ = add_key(
        folder / "keys.json", name="some", scopes=("infer", "admin"), adapters=("own",)
    )
    settings = ServeSettings(
        base=str(base), adapters_dir=folder / "adapters", adapters_poll=0,
        keys=folder / "keys.json",
    )  # fmt: skip
    service = build_service(settings)
    # An experiment that has ended, whose answers are kept.
    answered = Answered(
        id="chatcmpl-1", choice=0, kind="experiment", source=HIDDEN, variant=HIDDEN,
        models=(HIDDEN,), identity="", key="", user=None, prompt={}, answer={},
        finish_reason="stop", tokens=1, seconds=1.0,
    )  # fmt: skip
    service.feedback.record([answered])
    work = Work()
    service.adapters._by_name = Watched(service.adapters._by_name, work.noted)
    service.feedback.experiments = Watched(service.feedback.experiments, work.noted)
    yield create_app(service), work, key
    service.close()


def _refusal(app: Any, work: Work, key: str, route: str, name: str) -> tuple[list[str], Any]:
    """What the server does to refuse a name, and its answer."""
    method, path, body = ROUTES[route]
    content = {"json": body(name)} if body(name) else {}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            headers = {"authorization": f"Bearer {key}"}
            return await http.request(
                method, path.replace("NAME", name), headers=headers, **content
            )

    work.noted.clear()
    # Threads that begin meanwhile, too.
    threading.setprofile(work.profile)
    sys.setprofile(work.profile)
    try:
        answer = asyncio.run(ask())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return list(work.noted), answer


@pytest.mark.parametrize("route", ROUTES)
def test_a_hidden_name_is_refused_by_the_same_work_as_an_unknown_one(app, route) -> None:
    for name in (WARM, WARM):  # what is compiled or remembered once
        _refusal(*app, route, name)
    hidden, hidden_answer = _refusal(*app, route, HIDDEN)
    absent, absent_answer = _refusal(*app, route, ABSENT)
    assert hidden_answer.status_code == absent_answer.status_code
    assert hidden_answer.status_code in (403, 404)
    assert hidden_answer.text.replace(HIDDEN, ABSENT) == absent_answer.text
    assert any("allows" in one for one in hidden)
    assert hidden == absent


def test_a_name_of_its_own_is_looked_up(app) -> None:
    """The profile would show a look-up: it does for a name that the key may use."""
    found, answer = _refusal(*app, "card", "own")
    absent, _ = _refusal(*app, "card", ABSENT)
    assert answer.status_code == 200
    assert "AdapterRegistry.entry" in found
    assert "AdapterRegistry.entry" not in absent
    assert "look-up" in found
