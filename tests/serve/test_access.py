"""Keys over HTTP: who may come in, what exists for whom, and how much of it."""

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from in_process_server import serving
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.cli.client import Client
from qlora_serve.errors import ConfigError, RequestError
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.keys import add_key, revoke_key
from qlora_serve.serve.logs import JsonLines
from qlora_serve.serve.run import build_service, serve

SECRET_PROMPT = "the-prompt-that-must-stay-private"
MESSAGES = [{"role": "user", "content": SECRET_PROMPT}]


class Server:
    def __init__(self, folder: Path, url: str, service: Service) -> None:
        self.folder, self.url, self.service = folder, url, service
        self.file = folder / "keys.json"
        self.ids: dict[str, str] = {}

    def key(self, name: str, **fields: Any) -> str:
        key, record = add_key(self.file, name=name, **fields)
        self.ids[name] = record.id
        return key

    def openai(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, key: str | None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("access")
    base = write_tiny_model(folder / "tiny")
    for number, name in enumerate(("alpha", "beta")):
        write_random_adapter(folder / "adapters" / name, base, seed=number)
    add_key(folder / "keys.json", name="first")
    settings = ServeSettings(
        base=str(base), adapters_dir=folder / "adapters", dtype="float32", adapters_poll=0,
        keys=folder / "keys.json",
    )  # fmt: skip
    service = build_service(settings)
    with serving(service) as url:
        yield Server(folder, url, service)


def _ask(client: openai.OpenAI, model: str = "alpha", **more: Any) -> Any:
    fields = {"messages": MESSAGES, "model": model, "max_tokens": 4, "temperature": 0}
    return client.chat.completions.create(**(fields | more))


def test_without_a_key_nothing_is_told(server) -> None:
    for wrong in ("qls-wrong", "x" * 10_000):
        with pytest.raises(openai.AuthenticationError) as refused:
            _ask(server.openai(wrong))
        assert refused.value.code == "invalid_api_key"
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
        assert wrong not in str(refused.value)
    with server.http(None) as http:
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/nowhere", "/v1/models/alpha"):
            assert http.get(path).status_code == 401, path
        for path in ("/health", "/ready", "/docs", "/docs/files/swagger-ui.css", "/openapi.json"):
            assert http.get(path).status_code == 200, path
        headers = {"authorization": "Basic eDp5"}
        assert http.get("/v1/models", headers=headers).status_code == 401
        # Not a byte of the body is read.
        assert http.post("/v1/chat/completions", content=b"{" * 9_000_000).status_code in (401, 413)


def test_a_key_works_at_once_and_a_revoked_one_no_longer(server) -> None:
    client = server.openai(server.key("coming and going"))
    answer = _ask(client)
    assert answer.model == "alpha"
    revoke_key(server.file, "coming and going")
    with pytest.raises(openai.AuthenticationError):
        _ask(client)


def test_the_terminals_client_takes_its_key_from_the_environment(server, monkeypatch) -> None:
    monkeypatch.setenv("QLORA_SERVE_KEY", server.key("terminal", adapters=("beta",)))
    assert Client(server.url).models() == ["tiny", "beta"]
    monkeypatch.delenv("QLORA_SERVE_KEY")
    with pytest.raises(RequestError, match="wants a key"):
        Client(server.url).models()


def test_scopes(server) -> None:
    asking = server.http(server.key("asks", scopes=("infer",)))
    managing = server.http(server.key("manages", scopes=("admin",)))
    body = {"messages": MESSAGES, "max_tokens": 1}
    with pytest.raises(openai.PermissionDeniedError) as refused:
        _ask(server.openai(managing.headers["authorization"].split()[1]))
    assert "'infer'" in str(refused.value)
    for path, sent in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        assert managing.post(path, json=sent).status_code == 403, path
        assert asking.post(path, json=sent).status_code == 200, path
    for method, path, sent in (
        ("POST", "/v1/adapters", {"name": "alpha"}),
        ("PATCH", "/v1/adapters/alpha", {"pin": False}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "x"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "alpha"}),
        ("DELETE", "/v1/adapters/alpha", None),
    ):
        refused = asking.request(method, path, json=sent)
        assert refused.status_code == 403, path
        assert refused.json()["error"]["type"] == "permission_error"
    assert asking.post("/v1/chat/completions", json=body).status_code == 200
    assert managing.patch("/v1/adapters/alpha", json={"pin": False}).status_code == 200
    assert managing.get("/v1/adapters/alpha").json()["path"]
    assert asking.get("/v1/adapters/alpha").json()["path"] is None


def _same_but_for_the_name(one: httpx.Response, other: httpx.Response, a: str, b: str) -> None:
    assert one.status_code == other.status_code
    assert one.text.replace(a, "?") == other.text.replace(b, "?")
    skipped = ("x-request-id", "date", "content-length")
    assert [k for k in one.headers if k not in skipped] == [
        k for k in other.headers if k not in skipped
    ]


def test_an_adapter_of_others_looks_like_one_that_does_not_exist(server) -> None:
    key = server.key("only alpha", adapters=("alpha", "missing*"), scopes=("infer", "admin"))
    client, http = server.openai(key), server.http(key)
    everyone = server.http(server.key("everyone"))
    _ask(server.openai(everyone.headers["authorization"].split()[1]), "beta")
    assert _ask(client).model == "alpha"
    assert {model.id for model in client.models.list()} == {"tiny", "alpha"}
    assert [card["id"] for card in http.get("/v1/adapters").json()["data"]] == ["alpha"]
    with pytest.raises(openai.NotFoundError) as refused:
        _ask(client, "beta")
    assert "known here: alpha, tiny" in str(refused.value)

    def posted(name: str, path: str, **body: Any) -> httpx.Response:
        return http.post(path, json={"max_tokens": 1, **body})

    # `none` is outside of the key's patterns too; `missing` is within them and is not there.
    for absent in ("none", "missing"):
        for name in ("beta", absent):
            assert http.get(f"/v1/models/{name}").status_code == 404
        pairs = [
            (lambda n: http.get(f"/v1/models/{n}")),
            (lambda n: http.get(f"/v1/adapters/{n}")),
            (lambda n: http.delete(f"/v1/adapters/{n}")),
            (lambda n: http.patch(f"/v1/adapters/{n}", json={"pin": True})),
            (lambda n: http.patch(f"/v1/adapters/{n}", json={"default_scale": 2})),
            (lambda n: http.post("/v1/unload_lora_adapter", json={"lora_name": n})),
            (lambda n: posted(n, "/v1/chat/completions", model=n, messages=MESSAGES)),
            (lambda n: posted(n, "/v1/chat/completions", adapter=n, messages=MESSAGES)),
            (lambda n: posted(n, "/v1/chat/completions", model=n, adapter="alpha",
                              messages=MESSAGES)),
            (lambda n: posted(n, "/v1/chat/completions", messages=MESSAGES,
                              adapter=[{"name": "alpha"}, {"name": n, "weight": 9}])),
            (lambda n: posted(n, "/v1/completions", model=n, prompt="x", adapter_scale=2)),
            (lambda n: http.post("/v1/responses", json={"model": n, "input": "x"})),
            (lambda n: http.post("/tokenize", json={"model": n, "prompt": "x"})),
            (lambda n: http.post("/detokenize", json={"model": n, "tokens": [1]})),
        ]  # fmt: skip
        for ask in pairs:
            hidden, missing = ask("beta"), ask(absent)
            assert hidden.status_code == 404
            _same_but_for_the_name(hidden, missing, "beta", absent)
    # A name of its own does not open another one's files.
    path = str(server.folder / "adapters" / "beta")
    for name in ("missing1", "beta", "none"):
        assert http.post("/v1/adapters", json={"name": name, "path": path}).status_code == 403
    elsewhere = str(server.folder / "adapters" / "none")
    refusals = [
        http.post("/v1/adapters", json={"name": "missing1", "path": p}) for p in (path, elsewhere)
    ]
    _same_but_for_the_name(*refusals, "beta", "none")
    assert server.http(key).get("/v1/adapters/alpha").status_code == 200


def test_metrics_show_a_key_its_own_adapters_only(server) -> None:
    key = server.key("metrics", adapters=("alpha",))
    everyone = server.key("metrics of all")
    for model in ("alpha", "beta", "tiny"):
        _ask(server.openai(everyone), model)
    shown = server.http(key).get("/metrics").text
    assert 'adapter="alpha"' in shown
    assert 'adapter="tiny"' in shown
    assert "beta" not in shown
    assert "qlora_serve_kv_blocks " in shown
    assert 'adapter="beta"' in server.http(everyone).get("/metrics").text
    go_on = threading.Event()
    run = server.service.engine.runner.run
    begun = threading.Event()
    server.service.engine.runner.run = lambda step: (begun.set(), go_on.wait(60), run(step))[2]
    try:
        asking = threading.Thread(target=_ask, args=(server.openai(everyone), "beta"))
        asking.start()
        assert begun.wait(60)
        assert "beta" not in server.http(key).get("/metrics").text
        assert 'running_lora_adapters="beta"' in server.http(everyone).get("/metrics").text
    finally:
        go_on.set()
        server.service.engine.runner.run = run
    asking.join(60)


def test_a_key_without_the_base(server) -> None:
    client = server.openai(server.key("no base", base=False, adapters=("alpha",)))
    assert [model.id for model in client.models.list()] == ["alpha"]
    for fields in ({"model": "tiny"}, {"model": "base"}, {"model": "alpha",
                   "extra_body": {"adapter": "base"}}):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as refused:
            _ask(client, **fields)
        assert "known here: alpha" in str(refused.value)
    assert _ask(client, "tiny", extra_body={"adapter": "alpha"}).model == "alpha"
    nameless = server.http(client.api_key).post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 1}
    )
    assert nameless.status_code == 404


def test_limits_are_429_with_the_usual_headers(server) -> None:
    client = server.openai(server.key("slow", requests_per_minute=2))
    for left in ("1", "0"):
        answer = client.chat.completions.with_raw_response.create(
            messages=MESSAGES, model="alpha", max_tokens=1
        )
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    with pytest.raises(openai.RateLimitError) as refused:
        _ask(client)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_of_prompts_and_answers_are_counted(server, stream) -> None:
    key = server.key(f"tokens {stream}", tokens_per_minute=100_000, tokens_per_day=100_000)
    client = server.openai(key)
    answer = _ask(client, stream=stream, n=2)
    if stream:
        list(answer)
    once = _ask(client, n=2).usage.total_tokens
    quota = server.service.keys.caller(key).quota
    assert quota._used_today == 2 * once
    assert quota.inside == 0
    small = server.openai(server.key(f"few tokens {stream}", tokens_per_day=once))
    first = _ask(small, stream=stream, n=2)
    if stream:
        list(first)
    with pytest.raises(openai.RateLimitError) as refused:
        _ask(small, stream=stream)
    assert refused.value.code == "insufficient_quota"


def test_requests_at_once(server) -> None:
    key = server.key("one at a time", concurrent_requests=1)
    go_on = threading.Event()
    run = server.service.engine.runner.run
    server.service.engine.runner.run = lambda step: (go_on.wait(60), run(step))[1]
    try:
        asking = threading.Thread(target=_ask, args=(server.openai(key),))
        asking.start()
        while not server.service.traffic.live:
            pass
        refused = server.http(key).get("/v1/models")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
    finally:
        go_on.set()
        server.service.engine.runner.run = run
    asking.join(60)
    assert server.http(key).get("/v1/models").status_code == 200


def test_every_key_takes_turns_of_its_own(server) -> None:
    seen = []
    submit = server.service.engine.submit
    server.service.engine.submit = lambda request, deliver: (
        seen.append(request.client), submit(request, deliver)
    )  # fmt: skip
    try:
        for name in ("turn one", "turn two"):
            _ask(server.openai(server.key(name)))
    finally:
        server.service.engine.submit = submit
    assert seen == [server.ids["turn one"], server.ids["turn two"]]


def test_logs_hold_acts_and_ids_but_no_keys_and_no_prompts(server, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    key = server.key("logged", scopes=("infer", "admin"))
    http = server.http(key)
    shutil.copytree(server.folder / "adapters" / "alpha", server.folder / "adapters" / "extra")
    sent = {"x-request-id": "req-4711"}
    assert http.post("/v1/adapters", json={"name": "extra"}, headers=sent).status_code == 200
    _ask(server.openai(key), "extra")
    http.post("/v1/chat/completions", json={"messages": MESSAGES, "prompt": SECRET_PROMPT})
    http.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": SECRET_PROMPT})
    http.post("/v1/chat/completions", content=SECRET_PROMPT)
    assert http.delete("/v1/adapters/extra").status_code == 200
    assert http.delete("/v1/adapters/extra").status_code == 404
    stranger = server.http("qls-not-a-key")
    stranger.get(f"/v1/models?key={key}")
    stranger.get("/health")  # on the same connection, so that the line before has been written
    clients = ("httpx", "httpcore", "openai")  # the test's own
    records = [record for record in caplog.records if not record.name.startswith(clients)]
    lines = [JsonLines().format(record) for record in records]
    assert not any(key in line or "qls-" in line or SECRET_PROMPT in line for line in lines)
    audit = [json.loads(line) for line in lines if '"qlora_serve.audit"' in line]
    assert [(line["act"], line["adapter"], line["result"]) for line in audit] == [
        ("load", "extra", "done"), ("unload", "extra", "done"),
        ("unload", "extra", "UnknownAdapterError"),
    ]  # fmt: skip
    assert {line["by"] for line in audit} == {server.ids["logged"]}
    assert audit[0]["request_id"] == "req-4711"
    requests = [json.loads(line) for line in lines if '"qlora_serve.requests"' in line]
    assert {"method", "path", "status", "seconds", "key", "request_id"} <= requests[0].keys()
    assert any(line["status"] == 401 and line["path"] == "/v1/models" for line in requests)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_other_machines_are_let_in_only_with_keys_or_a_word(host) -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        serve(ServeSettings(base="nowhere", host=host))


def test_a_keys_file_must_be_there(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no keys file at"):
        build_service(ServeSettings(base="nowhere", keys=tmp_path / "none.json"))
