"""A tiny base and a changer of adapter directories, for the adapter tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_models import write_random_adapter, write_tiny_model

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    return write_random_adapter(tmp_path / "adapter", base)


@pytest.fixture
def edit_tensors() -> Callable[..., Path]:
    """Rewrites an adapter's tensors with a function of their dictionary."""

    def edit(adapter: Path, change) -> Path:
        save_file(change(load_file(adapter / FILE)), adapter / FILE, {"format": "pt"})
        return adapter

    return edit


@pytest.fixture
def edit_config() -> Callable[..., Path]:
    """Sets keys of an adapter's config."""

    def edit(adapter: Path, **changes) -> Path:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return adapter

    return edit
