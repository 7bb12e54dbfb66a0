"""Tiny bases and adapters of the merge tests, written once."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Gives the directory of a tiny base of a family; each is written once."""
    folder = tmp_path_factory.mktemp("bases")
    written: dict[str, Path] = {}

    def base(kind: str = "llama") -> Path:
        if kind not in written:
            written[kind] = write_tiny_model(folder / kind, kind)
        return written[kind]

    return base


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Threads only wait for one another on models this small.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
