"""A chat template that does harm ends in an error, and the server lives on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from in_process_server import serving
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.errors import BaseModelError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
# Nothing constant, which Jinja would compute when it compiles the template.
HARM = {
    "loops": LOOPS,
    "power": "{{ 9 ** (9 ** (messages | length + 8)) }}",
    "doubles": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "pads": "{{ 'x'.ljust(10 ** 9) }}",
    "writes": "{% for a in range(99) %}{{ 'x' * 200000 }}{% endfor %}",
    "insides": "{{ messages.__class__.__mro__ }}",
}
SAID = {
    "loops": "the chat template did not end within 0.5 s",
    "power": "the chat template did not end within 0.5 s",
    "doubles": "more memory than a template is given",
    "pads": "more memory than a template is given",
    "writes": " characters; 16777216 are allowed",
    "insides": "unsafe",
}


def _asking(template: str) -> str:
    """A template that does harm when the last message asks for it."""
    cases = "".join(
        f"{{% if messages[-1].content == '{name}' %}}{harm}{{% endif %}}"
        for name, harm in HARM.items()
    )
    return cases + template


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    base = write_tiny_model(tmp_path_factory.mktemp("templates") / "tiny")
    file = base / "chat_template.jinja"
    file.write_text(_asking(file.read_text()))
    service = build_service(ServeSettings(base=str(base)))
    # The memory for some of these takes as long to come as the machine likes.
    service.base.templates._seconds = 60.0
    service.base.templates.close()
    with serving(service) as url:
        yield service, httpx.Client(base_url=url, timeout=120)


def _chat(content: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


@pytest.mark.parametrize("name", HARM)
def test_a_request_on_which_the_bases_template_does_harm_is_refused(
    served, name, monkeypatch
) -> None:
    service, http = served
    if "did not end" in SAID[name]:
        monkeypatch.setattr(service.base.templates, "_seconds", 0.5)
        service.base.templates.close()  # the next one has this limit
    fine = http.post("/v1/chat/completions", json=_chat("hello", temperature=0)).json()
    refused = http.post("/v1/chat/completions", json=_chat(name, stream=name == "pads"))
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert SAID[name] in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    again = http.post("/v1/chat/completions", json=_chat("hello", temperature=0)).json()
    assert again["choices"] == fine["choices"]
    if "did not end" in SAID[name]:
        service.base.templates.close()


def test_every_route_renders_within_the_limits(served) -> None:
    service, http = served
    messages = _chat("pads")["messages"]
    for route, body in (
        ("/v1/responses", {"input": "pads"}),
        ("/v1/compare", {"messages": messages, "variants": ["base"]}),
        ("/tokenize", {"messages": messages}),
    ):
        refused = http.post(route, json=body)
        assert refused.status_code == 400, (route, refused.text)
        assert SAID["pads"] in refused.json()["error"]["message"]
    assert service.engine.scheduler.sequences() == []


def test_a_base_whose_template_never_ends_is_refused_at_start(tmp_path) -> None:
    base = write_tiny_model(tmp_path / "tiny")
    (base / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(BaseModelError, match="the chat template did not end within 2 s and 256 Mi"):
        build_service(ServeSettings(base=str(base)))


def test_an_adapters_template_holds_up_nobody_else(tmp_path) -> None:
    base = write_tiny_model(tmp_path / "tiny")
    adapter = write_random_adapter(tmp_path / "own", base)
    plain = (base / "chat_template.jinja").read_text()
    (adapter / "chat_template.jinja").write_text(_asking(plain))
    service = build_service(
        ServeSettings(base=str(base), adapter={"own": adapter}, adapter_templates=True)
    )
    templates = service.adapters._templates
    assert templates is not None
    templates.close()
    templates._seconds = 600.0  # it goes on until it is ended below
    begun = threading.Event()
    real_ask = templates._ask

    def ask(process, line):
        begun.set()
        return real_ask(process, line)

    templates._ask = ask
    with serving(service) as url, ThreadPoolExecutor(1) as pool:
        http = httpx.Client(base_url=url, timeout=600)
        held = pool.submit(http.post, "/v1/chat/completions", json=_chat("loops", model="own"))
        assert begun.wait(60)
        assert http.post("/v1/chat/completions", json=_chat("hello")).status_code == 200
        assert not held.done()
        templates._process.kill()
        error = held.result(60).json()["error"]
        assert "the adapter's chat template did not end within" in error["message"]
        served = http.post("/v1/chat/completions", json=_chat("hello", model="own"))
        assert served.status_code == 200
