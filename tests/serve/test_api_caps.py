"""Caps refuse clearly, ids come back, metrics count."""

import threading

import httpx
import pytest
from in_process_server import serving
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caps")
    base = write_tiny_model(folder / "tiny")
    return base, write_random_adapter(folder / "one", base)


@pytest.fixture
def serve(paths):
    """Starts a server with settings; gives its service and a client."""
    opened = []

    def start(**settings):
        service = build_service(ServeSettings(base=str(paths[0]), **settings))
        server = serving(service)
        opened.append(server)
        return service, httpx.Client(base_url=server.__enter__(), timeout=60)

    yield start
    for server in opened:
        server.__exit__(None, None, None)


def _chat(**more):
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **more}


def test_every_cap_is_a_clear_refusal(serve) -> None:
    _, http = serve(
        max_body_size="2KB", max_messages=2, max_output_tokens=8, max_choices=2, max_stop_texts=1,
        max_logit_biases=1, max_tools=1, max_schema_size="50",
    )  # fmt: skip
    tool = {"type": "function", "function": {"name": "f"}}
    for body, param, said in (
        (_chat(messages=_chat()["messages"] * 3), "messages", "3 messages; this server takes at m"),
        (_chat(max_tokens=9), "max_tokens", "9 tokens; this server takes at most 8"),
        (_chat(n=3), "n", "3 answers in one request"),
        (_chat(stop=["a", "b"]), "stop", "2 texts"),
        (_chat(logit_bias={"1": 1, "2": 2}), "logit_bias", "2 entries"),
        (_chat(tools=[tool, {**tool, "function": {"name": "g"}}]), "tools", "2 functions"),
        (_chat(structured_outputs={"regex": "a" * 51}), "structured_outputs", "51 bytes"),
    ):
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400, body
        error = refused.json()["error"]
        assert error["param"] == param
        assert said in error["message"]
    free = http.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": None, "ignore_eos": True}
    )
    assert free.json()["usage"]["completion_tokens"] == 8
    large = b'{"prompt": "' + b"x" * 3000 + b'"}'
    headers = {"content-type": "application/json"}
    chunks = iter([large[:1500], large[1500:]])
    for content in (large, chunks):  # with a length, and without one
        refused = http.post("/v1/completions", content=content, headers=headers)
        assert refused.status_code == 413
        assert "2000 bytes" in refused.json()["error"]["message"]


def test_a_full_queue_and_too_many_requests_are_503_with_retry_after(serve) -> None:
    service, http = serve(max_sequences=1, max_queued_answers=1, max_concurrent_requests=2)
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        refused = http.post("/v1/completions", json={"prompt": "x", "n": 2})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "queues 1 beyond the 1" in refused.json()["error"]["message"]
        with http.stream("POST", "/v1/completions", json={**body, "max_tokens": 1}) as second:
            busy = http.post("/tokenize", json={"prompt": "x"})
            assert busy.status_code == 503
            assert busy.headers["retry-after"] == "1"
            assert "2 requests at once" in busy.json()["error"]["message"]
            assert http.get("/health").status_code == 200
            assert "[DONE]" in second.read().decode()
        assert "data: [DONE]" in list(lines)
    assert service.traffic.live == 0
    assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("setting", ["queue_timeout", "request_timeout"])
def test_a_request_that_takes_too_long_ends_with_an_error(serve, setting) -> None:
    service, http = serve(**{setting: 0.2})
    gate = threading.Event()
    run = service.engine.runner.run

    def slow(step):
        gate.wait(60)
        return run(step)

    service.engine.runner.run = slow
    body = {"prompt": "x", "max_tokens": 5}
    refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 503
    assert "longer than the 0.2 s" in refused.json()["error"]["message"]
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert "longer than the 0.2 s" in lines[-1]
    gate.set()
    service.engine.runner.run = run
    assert service.traffic.live == 0


def test_request_ids_and_closed_cors(serve) -> None:
    _, http = serve()
    first, second = (http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    for given, kept in (("abc-1", True), ("x" * 200, False), ("a b", False)):
        found = http.get("/nothing", headers={"x-request-id": given}).headers["x-request-id"]
        assert (found == given) is kept
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/models", headers=asked).headers
    _, http = serve(cors_origins=("https://page.example",))
    allowed = http.options("/v1/models", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = http.get("/v1/models", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_metrics_count_by_adapter_with_a_bounded_number_of_names(serve, paths) -> None:
    service, http = serve(adapter={"one": paths[1]})

    def sample(name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for found in family.samples:
                if found.name == name and labels.items() <= found.labels.items():
                    return found.value
        return 0

    body = _chat(n=2, ignore_eos=True)
    usage = http.post("/v1/chat/completions", json={**body, "model": "one"}).json()["usage"]
    http.post("/v1/chat/completions", json=body)
    assert sample("qlora_serve_requests_total", adapter="one", reason="length") == 2
    assert sample("qlora_serve_completion_tokens_total", adapter="one") == 8
    assert sample("qlora_serve_prompt_tokens_total", adapter="one") == 2 * usage["prompt_tokens"]
    assert sample("qlora_serve_time_to_first_token_seconds_count", adapter="tiny") == 2
    assert sample("qlora_serve_waiting") == 0
    assert sample("qlora_serve_kv_blocks") > 0
    gate, begun, run = threading.Event(), threading.Event(), service.engine.runner.run
    service.engine.runner.run = lambda step: run(step) if not begun.set() and gate.wait(60) else []
    stream = {**_chat(model="one"), "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=stream) as running:
        lines = running.iter_lines()
        assert begun.wait(60)
        page = http.get("/metrics").text
        found = [line for line in page.splitlines() if line.startswith("vllm:lora")]
        assert 'running_lora_adapters="one"' in found[0]
        assert 'waiting_lora_adapters=""' in found[0]
        gate.set()
        assert "data: [DONE]" in list(lines)
    for number in range(150):
        service.metrics._names.add(f"adapter-{number}")
        if len(service.metrics._names) == 100:
            break
    assert len(service.metrics._names) == 100
    service.metrics._names.discard("one")
    service.metrics._names.add("adapter-x")
    http.post("/v1/chat/completions", json=_chat(model="one"))
    assert sample("qlora_serve_requests_total", adapter="other") == 1


def test_adapters_that_wait_for_a_place_are_told_from_those_that_run(serve, paths) -> None:
    service, http = serve(adapter={"one": paths[1], "two": paths[1]}, max_sequences=1)
    gate, begun, run = threading.Event(), threading.Event(), service.engine.runner.run
    service.engine.runner.run = lambda step: run(step) if not begun.set() and gate.wait(60) else []
    first, second = ({**_chat(model=name), "stream": True} for name in ("one", "two"))
    with http.stream("POST", "/v1/chat/completions", json=first) as running:
        assert begun.wait(60)
        with http.stream("POST", "/v1/chat/completions", json=second) as waiting:
            page = http.get("/metrics").text
            gate.set()
            assert "data: [DONE]" in list(running.iter_lines())
            assert "data: [DONE]" in list(waiting.iter_lines())
    (info,) = [line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert 'running_lora_adapters="one"' in info
    assert 'waiting_lora_adapters="two"' in info
    assert service.engine.placed() == {}
