"""Adapters on the device, in host memory and on disk; replaced and removed while serving."""

import gc
import queue
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_batch import reference
from tiny_models import write_random_adapter, write_tiny_model

import qlora_serve.serve.engine.content as content_module
from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError, AdapterUnavailableError, UnknownAdapterError
from qlora_serve.serve.engine.content import examine
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits
from qlora_serve.serve.engine.watch import AdapterFolder

PROMPT = tuple(range(10, 30))
COUNT = 6


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


class Server:
    """A registry and an engine, without HTTP."""

    def __init__(self, runner: Runner, **limits: int) -> None:
        self.registry = AdapterRegistry(runner, **limits)
        self.engine = Engine(runner, Limits(8, 4000, 64, 400), self.registry.residency)
        self.registry.residency.wake = self.engine.wake
        self.engine.start()
        self._count = 0

    def ask(self, adapter: Any, max_tokens: int = 24) -> "queue.Queue[Event]":
        events: queue.Queue[Event] = queue.Queue()
        self._count += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        if isinstance(adapter, str):
            adapter = self.registry.resolve(adapter)
        self.engine.submit(
            GenerationRequest(f"r{self._count}", PROMPT, sampling, adapter), events.put
        )
        return events

    def close(self) -> None:
        self.engine.stop()
        self.registry.close()


@pytest.fixture
def start(runner) -> Iterator[Any]:
    servers = []

    def begin(**limits: int) -> Server:
        servers.append(Server(runner, **limits))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def _answer(events: "queue.Queue[Event]") -> tuple[str, Finished | Failed]:
    text = ""
    while isinstance(event := events.get(timeout=60), Delta):
        text += event.text
    return text, event


def _text(runner: Runner, tokens: list[int]) -> str:
    return runner.base.tokenizer.decode(tokens, skip_special_tokens=True)


def _collect(events: "queue.Queue[Event]") -> str:
    text, ending = _answer(events)
    assert isinstance(ending, Finished), ending
    return text


def _failure(events: "queue.Queue[Event]") -> str:
    ending = _answer(events)[1]
    assert isinstance(ending, Failed)
    return ending.message


def _largest(runner: Runner, paths: dict[str, Path]) -> int:
    registry = AdapterRegistry(runner)
    return max(registry.register(n, p).content.size for n, p in paths.items() if n != "base")


@pytest.mark.parametrize("host_memory", [0, 2**30])
def test_more_adapters_in_flight_than_fit_take_turns(
    runner, paths, expected, start, host_memory
) -> None:
    """Room for one of the largest, or two smaller ones, and requests for all at once."""
    memory = _largest(runner, paths)
    server = start(memory=memory, host_memory=host_memory)
    names = [f"a{n}" for n in range(COUNT)]
    for name in names:
        server.registry.register(name, paths[name])
    assert server.registry.residency.used == 0, "registering reads no weights to the device"
    asked = [(name, server.ask(name)) for name in [*names, *names[::-1], *names]]
    asked.append(("base", server.ask(None)))
    for name, events in asked:
        assert _collect(events) == _text(runner, expected[name]), name
    assert 0 < server.registry.residency.used <= memory
    assert server.registry.host.used <= host_memory
    assert all(slot.references == 0 for slot in server.registry.residency.slots())


def test_whoever_comes_and_goes_everyone_ends_once_and_nothing_stays_held(
    runner, paths, expected, start
) -> None:
    """Adapters and compositions, aborted at any time, with room for few, while names change."""
    server = start(memory=2 * _largest(runner, paths), host_memory=0)
    names = [f"a{n}" for n in range(COUNT)]
    for name in names:
        server.registry.register(name, paths[name])
    choices = random.Random(11)
    asked = []
    for number in range(60):
        name = choices.choice(names)
        adapter: Any = name
        if number % 5 == 0:
            others = choices.sample(names, 2)
            adapter = server.registry.select([(other, 0.5) for other in others])
        asked.append((name if adapter is name else None, server.ask(adapter, 6)))
        if choices.random() < 0.3:
            server.engine.abort(f"r{choices.randrange(1, number + 2)}")
        if number == 30:
            server.registry.unload("a0")
            server.registry.register("a0", paths["a0"])
    for name, events in asked:
        text, ending = _answer(events)
        assert isinstance(ending, Finished), ending
        if ending.reason == "length" and name is not None:
            assert text == _text(runner, expected[name][:6])
        assert events.empty()
    slots = server.registry.residency.slots()
    assert all(slot.references == 0 for slot in slots)
    assert server.registry.residency._table.waiting == 0
    assert server.registry.residency.used <= server.registry.residency.capacity


def test_an_adapter_that_can_never_fit_is_refused_with_the_numbers(runner, paths) -> None:
    registry = AdapterRegistry(runner, memory=1000)
    with pytest.raises(AdapterError, match=r"needs \d+ bytes .*--adapter-memory gives 1000"):
        registry.register("a0", paths["a0"])
    assert registry.names() == []


def test_a_directory_that_goes_away_fails_only_when_it_is_needed_again(
    runner, copies, expected, start
) -> None:
    server = start(memory=_largest(runner, copies), host_memory=0)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    assert _collect(server.ask("a5")) == _text(runner, expected["a5"])
    shutil.rmtree(copies["a5"])
    assert _collect(server.ask("a5")) == _text(runner, expected["a5"])  # still on the device
    assert _collect(server.ask("a4")) == _text(runner, expected["a4"])  # takes its room
    assert "no such directory" in _failure(server.ask("a5"))
    assert "no such directory" in server.registry.entry("a5").load_error
    assert _collect(server.ask("a4")) == _text(runner, expected["a4"])
    shutil.copytree(copies["a4"], copies["a5"])
    assert "has changed since it was registered" in _failure(server.ask("a5"))


def test_host_memory_outlives_the_directory(runner, copies, expected, start) -> None:
    server = start(memory=_largest(runner, copies))
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
        assert _collect(server.ask(name)) == _text(runner, expected[name])
    shutil.rmtree(copies["a4"])
    # Another one takes its place in the file system: what is in memory does not follow.
    shutil.copytree(copies["a0"], copies["a4"])
    for name in ("a5", "a4", "a5", "a4"):
        assert _collect(server.ask(name)) == _text(runner, expected[name])


def test_hot_replacing_under_load(runner, copies, paths, expected, start) -> None:
    """Requests in flight give the old answer, later ones the new; room for one adapter only."""
    server = start(memory=_largest(runner, copies))
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
    texts = [_collect(events) for events in old]
    texts[0] = first.text + texts[0]
    assert texts == [_text(runner, expected["a1"])] * 12
    assert {_collect(events) for events in new} == {_text(runner, expected["a2"])}
    assert {_collect(events) for events in others} == {_text(runner, expected["a3"])}


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
    assert first.text + _collect(running) == _text(runner, expected["a1"])
    server.engine.stop()
    gc.collect()
    server.registry.sweep()
    assert server.registry.residency.slots() == []
    assert server.registry.host.used == server.registry.residency.used == 0


def test_a_pinned_adapter_stays(runner, copies, expected, start) -> None:
    sizes = {
        name: examine(path, AdapterRegistry(runner)._fit, runner.base.model, 4).size
        for name, path in copies.items()
    }
    server = start(memory=sizes["a5"] + sizes["a0"], host_memory=0)
    server.registry.register("a0", copies["a0"], pin=True)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    assert _collect(server.ask("a0")) == _text(runner, expected["a0"])
    shutil.rmtree(copies["a0"])
    for name in ("a4", "a5", "a4", "a0"):
        assert _collect(server.ask(name)) == _text(runner, expected[name])
    server.registry.update("a5", pin=True)
    with pytest.raises(AdapterError, match=r"beside \d+ of pinned adapters"):
        server.registry.update("a4", pin=True)
    server.registry.update("a5", pin=False)
    server.registry.update("a0", pin=False)
    for name in ("a5", "a4"):
        assert _collect(server.ask(name)) == _text(runner, expected[name])
    assert "no such directory" in _failure(server.ask("a0"))


def test_weights_that_cannot_be_used_fail_their_request_with_the_reason(
    runner, copies, expected, start
) -> None:
    """Found only when the weights are read: the checks at registration saw other bytes."""
    server = start(memory=_largest(runner, copies), host_memory=0)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    file = copies["a5"] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(content)
    events = [server.ask("a5"), server.ask("a4"), server.ask("a5")]
    assert "NaN" in _failure(events[0])
    assert "NaN" in _failure(events[2])
    assert _collect(events[1]) == _text(runner, expected["a4"])


def test_a_fault_while_loading_is_the_requests_own(
    runner, paths, expected, start, monkeypatch
) -> None:
    server = start()
    for name in ("a1", "a2"):
        server.registry.register(name, paths[name])
    real = runner.resident

    def breaks(name, weights):
        if name == "a1":
            raise MemoryError("no memory left")
        return real(name, weights)

    monkeypatch.setattr(runner, "resident", breaks)
    assert "no memory left" in _failure(server.ask("a1"))
    assert _collect(server.ask("a2")) == _text(runner, expected["a2"])
    monkeypatch.undo()
    assert _collect(server.ask("a1")) == _text(runner, expected["a1"])


def test_decoding_goes_on_while_an_adapter_loads(
    runner, paths, expected, start, monkeypatch
) -> None:
    """A load that does not end before others have: no timing, only order."""
    server = start()
    server.registry.register("slow", paths["a1"])
    server.registry.load("quick", paths["a2"])
    others_are_done = threading.Event()
    real = runner.resident

    def waits(name, weights):
        assert others_are_done.wait(60)
        return real(name, weights)

    monkeypatch.setattr(runner, "resident", waits)
    slow = server.ask("slow")
    assert _collect(server.ask("quick")) == _text(runner, expected["a2"])
    assert _collect(server.ask(None)) == _text(runner, expected["base"])
    assert slow.empty()
    others_are_done.set()
    assert _collect(slow) == _text(runner, expected["a1"])


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


def test_the_folder_is_kept_in_step(runner, copies, paths, tmp_path, expected, start) -> None:
    folder = copies["a0"].parent
    for name in ("a3", "a4", "a5"):
        shutil.rmtree(folder / name)
    server = start()
    watched = AdapterFolder(server.registry, folder, reserved={"a2"})
    watched.scan()
    registry = server.registry
    assert registry.names() == ["a0", "a1"]
    first = registry.entry("a0")
    watched.scan()
    assert registry.entry("a0") is first, "what has not changed is not read again"

    # An object store beside it: names are links, which change in one step.
    objects = folder / ".objects"
    for name in ("a3", "a4"):
        shutil.copytree(paths[name], objects / name)
    (folder / "linked").symlink_to(Path(".objects") / "a3")
    shutil.rmtree(folder / "a1")
    watched.scan()
    assert registry.names() == ["a0", "linked"]
    old = registry.resolve("linked")
    (folder / "fresh").symlink_to(Path(".objects") / "a4")
    (folder / "fresh").replace(folder / "linked")
    watched.scan()
    assert _collect(server.ask(old)) == _text(runner, expected["a3"])
    assert _collect(server.ask("linked")) == _text(runner, expected["a4"])

    # Half written: listed with the reason, and served once it is whole.
    half = folder / "half"
    half.mkdir()
    shutil.copy(paths["a5"] / "adapter_config.json", half)
    watched.scan()
    with pytest.raises(AdapterUnavailableError, match=r"'half' cannot be used.*no adapter_model"):
        registry.resolve("half")
    shutil.copy(paths["a5"] / "adapter_model.safetensors", half)
    watched.scan()
    assert _collect(server.ask("half")) == _text(runner, expected["a5"])

    # Replaced by something broken: the old one goes on, and the reason is shown.
    (half / "adapter_model.safetensors").write_bytes(b"rubbish")
    watched.scan()
    assert "not a whole safetensors file" in registry.entry("half").reason
    assert _collect(server.ask("half")) == _text(runner, expected["a5"])

    # A name that cannot be used holds up nobody.
    shutil.copytree(paths["a5"], folder / "with a space")
    shutil.copytree(paths["a4"], folder / "without")
    watched.scan()
    assert registry.names() == ["a0", "half", "linked", "without"]

    # Unloaded by hand: stays away, until its files change.
    registry.unload("a0")
    watched.scan()
    assert "a0" not in registry.names()
    shutil.copy(paths["a1"] / "adapter_model.safetensors", folder / "a0")
    shutil.copy(paths["a1"] / "adapter_config.json", folder / "a0")
    watched.scan()
    assert _collect(server.ask("a0")) == _text(runner, expected["a1"])


def test_the_watch_notices_by_itself(runner, copies, paths, expected, start, monkeypatch) -> None:
    folder = copies["a0"].parent
    server = start()
    watched = AdapterFolder(server.registry, folder)
    watched.scan()
    has_come = threading.Event()
    real = server.registry.add

    def add(name, path, pin=False):
        entry = real(name, path, pin)
        if not entry.reason:  # else it was met half copied
            has_come.set()
        return entry

    monkeypatch.setattr(server.registry, "add", add)
    watched.start(0.01)
    try:
        shutil.copytree(paths["a5"], folder / "late")
        assert has_come.wait(60)
        assert _collect(server.ask("late")) == _text(runner, expected["a5"])
    finally:
        watched.stop()


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
