"""Adapters loaded, replaced and unloaded while serving; what is known of them beforehand."""

import gc
import shutil
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from tier_server import PROMPT, collect, largest, text_of
from tiny_models import write_random_adapter, write_tiny_model

import qlora_serve.serve.engine.content as content_module
from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError, UnknownAdapterError
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, GenerationRequest, Sampling
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits


def test_an_adapter_that_can_never_fit_is_refused_with_the_numbers(runner, paths) -> None:
    registry = AdapterRegistry(runner, memory=1000)
    with pytest.raises(AdapterError, match=r"needs \d+ bytes .*--adapter-memory gives 1000"):
        registry.register("a0", paths["a0"])
    assert registry.names() == []


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"r": 3, "target_modules": ["q_proj", "fc1"]},
    "dora": {"use_dora": True},
    "bias": {"bias": "all", "use_dora": True},
    "lora-bias": {"lora_bias": True},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head", "layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "tokens": {"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_size_is_known_before_loading_and_never_too_small(family, tmp_path) -> None:
    base = write_tiny_model(tmp_path / "base", family)
    for dtype in ("float32", "bfloat16"):
        registry = AdapterRegistry(Runner(load_base(str(base), dtype=dtype)))
        for name, kind in KINDS.items():
            path = tmp_path / name
            if not path.is_dir():
                if family == "llama" and name == "saved":
                    kind = {"modules_to_save": ["embed_tokens", "norm"]}
                write_random_adapter(path, base, **kind)
            content = registry.register(name, path).content
            slot = registry.select([(name, None)]).slots[0]
            _, size = registry._load_slot(slot)
            assert size <= content.size <= 1.3 * size + 4096, f"{name} {dtype}"


def test_cycles_of_loading_and_unloading_leave_nothing(runner, paths) -> None:
    registry = AdapterRegistry(runner)

    def cycle() -> None:
        for name in ("a1", "a2"):
            registry.load("name", paths[name])
        registry.unload("name")

    def held() -> Counter[str]:
        gc.collect()
        # By type: `isinstance` would ask lazy modules for their class, which imports them.
        kinds = (type(o) for o in gc.get_objects())
        return Counter(
            kind.__qualname__
            for kind in kinds
            if issubclass(kind, torch.Tensor) or str(kind.__module__).startswith("qlora_serve")
        )

    for _ in range(3):
        cycle()
    before = held()
    for _ in range(30):
        cycle()
    assert held() == before
    assert before["Tensor"] > 0
    assert registry.residency.slots() == []
    assert registry.host.used == 0


def test_a_known_identity_is_not_computed_again_unless_a_file_changed(
    runner, copies, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("QLORA_SERVE_CACHE", str(tmp_path / "cache"))
    hashed = []
    real = content_module.content_identity

    def counts(adapter, tensors):
        hashed.append(adapter.path.name)
        return real(adapter, tensors)

    monkeypatch.setattr(content_module, "content_identity", counts)
    registry = AdapterRegistry(runner)
    first = registry.register("a0", copies["a0"]).content.identity
    registry.register("a0", copies["a0"])
    assert hashed == ["a0", "a0"], "files that are this fresh may change within the clock's tick"
    monkeypatch.setattr(content_module, "_SETTLED_NS", 0)
    registry.register("a0", copies["a0"])
    assert registry.register("a0", copies["a0"]).content.identity == first
    assert hashed == ["a0"] * 3
    shutil.copy(copies["a0"] / "adapter_model.safetensors", tmp_path / "same")
    shutil.copy(tmp_path / "same", copies["a0"] / "adapter_model.safetensors")
    assert registry.register("a0", copies["a0"]).content.identity == first
    assert hashed == ["a0"] * 4


def test_loading_begins_when_a_request_comes_not_when_a_step_ends(
    runner, paths, copies, monkeypatch
) -> None:
    registry = AdapterRegistry(runner)
    registry.register("a0", copies["a0"])
    begun = threading.Event()
    resident = runner.resident

    def noted(*given: Any) -> Any:
        begun.set()
        return resident(*given)

    monkeypatch.setattr(runner, "resident", noted)
    engine = Engine(runner, Limits(8, 4000, 64, 400), registry.residency)
    try:  # the engine's thread is not started: no step will ever ask for the adapter
        sampling = Sampling(max_tokens=1, temperature=0.0)
        asked = GenerationRequest("r", PROMPT, sampling, registry.resolve("a0"))
        engine.submit(asked, lambda event: None)
        assert begun.wait(60)
    finally:
        registry.close()


def test_unloading_lets_running_requests_end_and_then_forgets(
    runner, paths, expected, start
) -> None:
    server = start()
    server.registry.load("name", paths["a1"])
    running = server.ask("name")
    first = running.get(timeout=60)
    assert isinstance(first, Delta)
    server.registry.unload("name")
    with pytest.raises(UnknownAdapterError, match="'name'; known here: none"):
        server.ask("name")
    assert first.text + collect(running) == text_of(runner, expected["a1"])
    server.engine.stop()
    gc.collect()
    server.registry.sweep()
    assert server.registry.residency.slots() == []
    assert server.registry.host.used == server.registry.residency.used == 0


def test_hot_replacing_under_load(runner, copies, paths, expected, start) -> None:
    """Requests in flight give the old answer, later ones the new; room for one adapter only."""
    server = start(memory=largest(runner, copies))
    server.registry.register("name", copies["a1"])
    server.registry.register("other", paths["a3"])
    old = [server.ask("name") for _ in range(12)]  # eight run, four wait
    others = [server.ask("other") for _ in range(4)]
    first = old[0].get(timeout=60)
    assert isinstance(first, Delta)
    shutil.rmtree(copies["a1"])
    shutil.copytree(paths["a2"], copies["a1"])
    server.registry.load("name", copies["a1"])
    new = [server.ask("name") for _ in range(4)]
    texts = [collect(events) for events in old]
    texts[0] = first.text + texts[0]
    assert texts == [text_of(runner, expected["a1"])] * 12
    assert {collect(events) for events in new} == {text_of(runner, expected["a2"])}
    assert {collect(events) for events in others} == {text_of(runner, expected["a3"])}
