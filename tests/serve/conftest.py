"""One tiny base with two adapters, served once for all tests of the HTTP surface."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from server_process import running_server
from tiny_models import write_random_adapter, write_tiny_model


@pytest.fixture(scope="session")
def api_paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("api")
    base = write_tiny_model(folder / "tiny")
    adapters = folder / "adapters"
    for number, name in enumerate(("tagging", "tickets")):
        write_random_adapter(adapters / name, base, seed=number)
    return {"base": base, "adapters": adapters}


@pytest.fixture(scope="session")
def api_url(api_paths) -> Iterator[str]:
    with running_server(api_paths["base"], "--adapters-dir", api_paths["adapters"]) as url:
        yield url


@pytest.fixture
def client(api_url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api_url}/v1", api_key="unused", max_retries=0)
