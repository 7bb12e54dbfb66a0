"""Adapters on the device, in host memory and on disk: whoever has room, the answers are right."""

import random
import shutil
import threading
from typing import Any

import pytest
from tier_server import COUNT, answer, collect, failure, largest, text_of

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.content import examine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Finished


@pytest.mark.parametrize("host_memory", [0, 2**30])
def test_more_adapters_in_flight_than_fit_take_turns(
    runner, paths, expected, start, host_memory
) -> None:
    """Room for one of the largest, or two smaller ones, and requests for all at once."""
    memory = largest(runner, paths)
    server = start(memory=memory, host_memory=host_memory)
    names = [f"a{n}" for n in range(COUNT)]
    for name in names:
        server.registry.register(name, paths[name])
    assert server.registry.residency.used == 0, "registering reads no weights to the device"
    asked = [(name, server.ask(name)) for name in [*names, *names[::-1], *names]]
    asked.append(("base", server.ask(None)))
    for name, events in asked:
        assert collect(events) == text_of(runner, expected[name]), name
    assert 0 < server.registry.residency.used <= memory
    assert server.registry.host.used <= host_memory
    assert all(slot.references == 0 for slot in server.registry.residency.slots())


def test_whoever_comes_and_goes_everyone_ends_once_and_nothing_stays_held(
    runner, paths, expected, start
) -> None:
    """Adapters and compositions, aborted at any time, with room for few, while names change."""
    server = start(memory=2 * largest(runner, paths), host_memory=0)
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
        text, ending = answer(events)
        assert isinstance(ending, Finished), ending
        if ending.reason == "length" and name is not None:
            assert text == text_of(runner, expected[name][:6])
        assert events.empty()
    slots = server.registry.residency.slots()
    assert all(slot.references == 0 for slot in slots)
    assert server.registry.residency._table.waiting == 0
    assert server.registry.residency.used <= server.registry.residency.capacity


def test_a_directory_that_goes_away_fails_only_when_it_is_needed_again(
    runner, copies, expected, start
) -> None:
    server = start(memory=largest(runner, copies), host_memory=0)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    assert collect(server.ask("a5")) == text_of(runner, expected["a5"])
    shutil.rmtree(copies["a5"])
    assert collect(server.ask("a5")) == text_of(runner, expected["a5"])  # still on the device
    assert collect(server.ask("a4")) == text_of(runner, expected["a4"])  # takes its room
    assert "no such directory" in failure(server.ask("a5"))
    assert "no such directory" in server.registry.entry("a5").load_error
    assert collect(server.ask("a4")) == text_of(runner, expected["a4"])
    shutil.copytree(copies["a4"], copies["a5"])
    assert "has changed since it was registered" in failure(server.ask("a5"))


def test_host_memory_outlives_the_directory(runner, copies, expected, start) -> None:
    server = start(memory=largest(runner, copies))
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
        assert collect(server.ask(name)) == text_of(runner, expected[name])
    shutil.rmtree(copies["a4"])
    # Another one takes its place in the file system: what is in memory does not follow.
    shutil.copytree(copies["a0"], copies["a4"])
    for name in ("a5", "a4", "a5", "a4"):
        assert collect(server.ask(name)) == text_of(runner, expected[name])


def test_a_pinned_adapter_stays(runner, copies, expected, start) -> None:
    sizes = {
        name: examine(path, AdapterRegistry(runner)._fit, runner.base.model, 4).size
        for name, path in copies.items()
    }
    server = start(memory=sizes["a5"] + sizes["a0"], host_memory=0)
    server.registry.register("a0", copies["a0"], pin=True)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    assert collect(server.ask("a0")) == text_of(runner, expected["a0"])
    shutil.rmtree(copies["a0"])
    for name in ("a4", "a5", "a4", "a0"):
        assert collect(server.ask(name)) == text_of(runner, expected[name])
    server.registry.update("a5", pin=True)
    with pytest.raises(AdapterError, match=r"beside \d+ of pinned adapters"):
        server.registry.update("a4", pin=True)
    server.registry.update("a5", pin=False)
    server.registry.update("a0", pin=False)
    for name in ("a5", "a4"):
        assert collect(server.ask(name)) == text_of(runner, expected[name])
    assert "no such directory" in failure(server.ask("a0"))


def test_weights_that_cannot_be_used_fail_their_request_with_the_reason(
    runner, copies, expected, start
) -> None:
    """Found only when the weights are read: the checks at registration saw other bytes."""
    server = start(memory=largest(runner, copies), host_memory=0)
    for name in ("a4", "a5"):
        server.registry.register(name, copies[name])
    file = copies["a5"] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(content)
    events = [server.ask("a5"), server.ask("a4"), server.ask("a5")]
    assert "NaN" in failure(events[0])
    assert "NaN" in failure(events[2])
    assert collect(events[1]) == text_of(runner, expected["a4"])


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
    assert "no memory left" in failure(server.ask("a1"))
    assert collect(server.ask("a2")) == text_of(runner, expected["a2"])
    monkeypatch.undo()
    assert collect(server.ask("a1")) == text_of(runner, expected["a1"])


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
    assert collect(server.ask("quick")) == text_of(runner, expected["a2"])
    assert collect(server.ask(None)) == text_of(runner, expected["base"])
    assert slow.empty()
    others_are_done.set()
    assert collect(slow) == text_of(runner, expected["a1"])
