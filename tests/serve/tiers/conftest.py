"""A tiny base with six adapters, and what each of them answers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_batch import reference
from tier_server import COUNT, PROMPT, Server
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.runner import Runner


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiers")
    base = write_tiny_model(folder / "base")
    return {"base": base} | {
        f"a{n}": write_random_adapter(folder / f"a{n}", base, seed=n, r=2 + n) for n in range(COUNT)
    }


@pytest.fixture(scope="module")
def runner(paths) -> Runner:
    return Runner(load_base(str(paths["base"]), dtype="float32"))


@pytest.fixture(scope="module")
def expected(paths) -> dict[str, list[int]]:
    """What `generate` alone answers through PEFT."""
    answers = {}
    for name, path in paths.items():
        model = reference(paths["base"], None if name == "base" else path)
        out = model.generate(
            input_ids=torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24, min_new_tokens=24
        )
        answers[name] = out[0, len(PROMPT) :].tolist()
    assert len({tuple(tokens) for tokens in answers.values()}) == len(paths)
    return answers


@pytest.fixture
def copies(paths, tmp_path) -> dict[str, Path]:
    """The adapters where a test may damage them."""
    folder = tmp_path / "adapters"
    return {
        name: Path(shutil.copytree(path, folder / name))
        for name, path in paths.items()
        if name != "base"
    }


@pytest.fixture
def start(runner) -> Iterator[Any]:
    servers = []

    def begin(**limits: int) -> Server:
        servers.append(Server(runner, **limits))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()
