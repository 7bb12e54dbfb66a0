"""The OpenAPI document is true: nothing that it allows, and little beside it, is a server error."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from in_process_server import serving
from tiny_models import write_tiny_model

from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service


@pytest.fixture(scope="module")
def served_url(tmp_path_factory):
    base = write_tiny_model(tmp_path_factory.mktemp("schema") / "tiny")
    service = build_service(ServeSettings(base=str(base), max_model_len=48))
    with serving(service) as url:
        yield url


@pytest.fixture(scope="module")
def openapi(served_url):
    return schemathesis.openapi.from_url(f"{served_url}/openapi.json")


CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.content_type_conformance,
]


def test_no_request_is_a_server_error_and_every_answer_has_its_shape(openapi) -> None:
    operations = [result.ok() for result in openapi.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:

        @settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case) -> None:
            response = case.call(timeout=60)
            case.validate_response(response, checks=CHECKS)

        check()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("DELETE", "/v1/chat/completions", 405),
        ("GET", "/tokenize", 405),
    ],
)
def test_unknown_routes_and_methods_have_openais_shape(served_url, method, path, status) -> None:
    response = httpx.request(method, served_url + path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "seed": 99999999999999999999}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "x", "structured_outputs": {"json": {"\\ud800": 1}}}',
        b'{"prompt": "x", "structured_outputs": {"json": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
        b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}",
        b"\xff\xfe",
        b"null",
        b'"text"',
    ],
)
def test_strange_bodies_are_refused(served_url, body) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served_url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_every_operation_has_a_summary_an_example_and_its_errors(served_url) -> None:
    document = httpx.get(f"{served_url}/openapi.json").json()
    components = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["description"], where
            assert "422" not in operation["responses"], where
            assert "200" in operation["responses"], where
            if method == "post":
                assert "400" in operation["responses"], where
                if not path.endswith("_lora_adapter"):  # these answer with a word, as vLLM does
                    answer = operation["responses"]["200"]["content"]["application/json"]
                    assert answer["schema"], where
                content = operation["requestBody"]["content"]["application/json"]["schema"]
                assert components[content["$ref"].split("/")[-1]]["examples"], where
