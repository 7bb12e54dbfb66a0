"""The folder of adapters that is watched."""

import shutil
import threading
from pathlib import Path

import pytest
from tier_server import collect, text_of

from qlora_serve.errors import AdapterUnavailableError
from qlora_serve.serve.engine.watch import AdapterFolder


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
    assert collect(server.ask(old)) == text_of(runner, expected["a3"])
    assert collect(server.ask("linked")) == text_of(runner, expected["a4"])

    # Half written: listed with the reason, and served once it is whole.
    half = folder / "half"
    half.mkdir()
    shutil.copy(paths["a5"] / "adapter_config.json", half)
    watched.scan()
    with pytest.raises(AdapterUnavailableError, match=r"'half' cannot be used.*no adapter_model"):
        registry.resolve("half")
    shutil.copy(paths["a5"] / "adapter_model.safetensors", half)
    watched.scan()
    assert collect(server.ask("half")) == text_of(runner, expected["a5"])

    # Replaced by something broken: the old one goes on, and the reason is shown.
    (half / "adapter_model.safetensors").write_bytes(b"rubbish")
    watched.scan()
    assert "not a whole safetensors file" in registry.entry("half").reason
    assert collect(server.ask("half")) == text_of(runner, expected["a5"])

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
    assert collect(server.ask("a0")) == text_of(runner, expected["a1"])


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
        assert collect(server.ask("late")) == text_of(runner, expected["a5"])
    finally:
        watched.stop()
