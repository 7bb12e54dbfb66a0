"""The store: names that point to content."""

import json
import multiprocessing
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.folder import OBJECTS, find_adapters, scan_adapters
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError, ConfigError, OutputError, UnknownAdapterError
from qlora_serve.files import held_staging
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service
from tests.bare_adapters import bare_tensors, content, write_bare_adapter


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    return write_bare_adapter(tmp_path / "source")


@pytest.fixture
def other(tmp_path):
    return write_bare_adapter(tmp_path / "other", seed=1)


def add(store, name, source, **options):
    return store.add(name, find_source(str(source)), str(source), **options)


def objects(store):
    return sorted(p.name for p in (store.folder / OBJECTS).iterdir() if p.is_dir())


def leftovers(store):
    return [p.name for p in (store.folder / OBJECTS).iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_content_is_not_taken_for_what_is_added(store, source, file):
    add(store, "mine", source)
    held = store.get("mine").path.resolve() / file
    damaged = bytearray(held.read_bytes())
    damaged[-2] ^= 1
    held.write_bytes(damaged)
    for name in ("mine", "twin"):
        with pytest.raises(OutputError, match=r"but damaged: .* remove mine with"):
            add(store, name, source, replace=True)
    assert list(find_adapters(store.folder)) == ["mine"]
    # What the message says to do helps.
    store.remove("mine")
    store.clean(0)
    add(store, "mine", source)
    assert content(store.folder / "mine") == content(source)


def test_name_is_a_link_that_any_tool_can_follow(store, source):
    added = add(store, "mine", source)
    assert not added.replaced
    assert not added.unchanged
    assert content(store.folder / "mine") == content(source)
    identity = content_identity(read_adapter(source))
    target = os.readlink(store.folder / "mine")
    assert target.startswith(f".objects/{identity[7:]}-")
    assert store.get("mine").identity == identity
    assert find_adapters(store.folder) == {"mine": store.folder / "mine"}
    assert store.get("mine").path == store.folder / target
    assert (store.folder / target).stat().st_mode & 0o777 == 0o755
    assert leftovers(store) == []


def test_peft_and_a_server_read_a_name_as_it_is(base, adapter, store):
    add(store, "mine", adapter)
    direct, named = (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
        )
        for folder in (adapter, store.folder / "mine")
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert named(ids).logits.equal(direct(ids).logits)
    service = build_service(ServeSettings(base=str(base), adapters_dir=store.folder))
    assert service.adapters.names() == ["mine"]
    assert service.adapters.resolve("mine").identity == store.get("mine").identity


def test_same_content_is_kept_once(store, source, other):
    add(store, "one", source)
    add(store, "two", source)
    assert len(objects(store)) == 1
    assert add(store, "one", source).unchanged
    # The same weights with another card are the same adapter, and another object: nothing is lost.
    (source / "README.md").write_text("a card")
    three = add(store, "three", source)
    assert three.entry.identity == store.get("one").identity
    assert len(objects(store)) == 2
    assert (store.folder / "three" / "README.md").read_text() == "a card"
    assert not (store.folder / "one" / "README.md").exists()


def test_taken_name_is_replaced_only_when_asked(store, source, other):
    add(store, "mine", source)
    with pytest.raises(OutputError, match="pass --replace"):
        add(store, "mine", other)
    assert content(store.folder / "mine") == content(source)
    assert add(store, "mine", other, replace=True).replaced
    assert content(store.folder / "mine") == content(other)


def test_moved_store_still_works(store, source, tmp_path):
    add(store, "mine", source)
    store.folder.rename(tmp_path / "moved")
    assert content(tmp_path / "moved" / "mine") == content(source)
    assert AdapterStore(tmp_path / "moved").get("mine").is_managed


def test_rename_and_remove(store, source, other):
    add(store, "one", source)
    add(store, "two", other)
    with pytest.raises(OutputError, match="pass --replace"):
        store.rename("one", "two")
    store.rename("one", "two", replace=True)
    assert list(store.list()) == ["two"]
    assert content(store.folder / "two") == content(source)
    assert store.rename("two", "two").name == "two"
    store.remove("two")
    assert store.list() == {}
    for act in (store.remove, store.get, lambda name: store.rename(name, "new")):
        with pytest.raises(UnknownAdapterError, match="known here: none"):
            act("two")


@pytest.mark.parametrize("name", ["base", "BASE", "..", "a/b", "", ".hidden", "-x"])
def test_names_that_cannot_be_given(store, source, name):
    with pytest.raises(ConfigError, match=r"choose another|cannot name"):
        add(store, name, source)
    assert not store.folder.exists()


def test_content_without_a_name_is_kept_for_a_grace_and_then_removed(store, source, other):
    add(store, "mine", source)
    loading = read_adapter(store.get("mine").path)
    add(store, "mine", other, replace=True)
    assert len(objects(store)) == 2
    assert loading.load_tensors().keys() == bare_tensors().keys()  # a server in the middle of it
    assert store.clean() == 0
    for mark in (store.folder / OBJECTS).glob("*.unused"):
        os.utime(mark, (0, 0))
    assert store.clean() == 1
    assert content(store.folder / "mine") == content(other)
    assert objects(store) == [store.get("mine").path.name]
    assert list((store.folder / OBJECTS).glob("*.unused")) == []
    with pytest.raises(AdapterError, match="is gone: it was removed from the store") as caught:
        loading.load_tensors()
    assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match="is gone"):
        read_adapter(loading.path)


def test_content_that_is_named_again_loses_its_mark(store, source):
    add(store, "mine", source)
    store.remove("mine")
    (mark,) = (store.folder / OBJECTS).glob("*.unused")
    os.utime(mark, (0, 0))
    add(store, "again", source)
    assert not mark.exists()
    assert store.clean(0) == 0
    assert content(store.folder / "again") == content(source)


def test_links_with_any_name_keep_their_content(store, source):
    add(store, "mine", source)
    (store.folder / "mine").rename(store.folder / "not a name!")
    assert store.clean(0) == 0
    assert len(objects(store)) == 1
    assert "cannot name" in scan_adapters(store.folder).refused["not a name!"]


def test_plain_directory_is_listed_and_left_alone(store, source, other):
    plain = write_bare_adapter(store.folder / "plain", seed=2)
    before = content(plain)
    entry = store.get("plain")
    assert (entry.is_managed, entry.identity, entry.path) == (False, None, plain)
    for act in (
        lambda: store.remove("plain"),
        lambda: store.rename("plain", "new"),
        lambda: add(store, "plain", source),
        lambda: add(store, "plain", source, replace=True),
    ):
        with pytest.raises(OutputError, match=r"unmanaged.*--force"):
            act()
    assert content(plain) == before
    store.rename("plain", "moved", force=True)
    assert content(store.folder / "moved") == before
    assert add(store, "moved", source, force=True).replaced
    assert store.get("moved").is_managed
    write_bare_adapter(store.folder / "plain")
    with pytest.raises(OutputError, match="plain directory"):
        store.rename("moved", "plain", force=True)
    store.remove("plain", force=True)
    assert list(store.list()) == ["moved"]
    assert leftovers(store) == []


def test_something_else_under_the_name_is_not_touched(store, source):
    store.folder.mkdir()
    (store.folder / "notes").write_text("mine")
    with pytest.raises(OutputError, match="is no adapter"):
        add(store, "notes", source, force=True)
    assert (store.folder / "notes").read_text() == "mine"


def test_failed_add_leaves_nothing(store, source, other):
    add(store, "mine", source)
    before = sorted(os.listdir(store.folder / OBJECTS))
    tensors = load_file(other / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN") as caught:
        add(store, "mine", other, replace=True)
    assert str(other) in str(caught.value)
    assert ".partial" not in str(caught.value)
    write_bare_adapter(other, peft_type="IA3")
    with pytest.raises(AdapterError, match="peft_type is 'IA3'"):
        add(store, "new", other)
    assert sorted(os.listdir(store.folder / OBJECTS)) == before
    assert content(store.folder / "mine") == content(source)


def test_objects_that_are_a_link_are_refused(store, source, tmp_path):
    store.folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (store.folder / OBJECTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="symbolic link"):
        add(store, "mine", source)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_work_of_the_living_is_left_alone(store, source):
    add(store, "mine", source)
    with held_staging(store.folder / OBJECTS, "work") as work:
        (work / "adapter").mkdir()
        store.remove("mine")
        assert (work / "adapter").is_dir()
    dead = store.folder / OBJECTS / ".work.00000000.partial"
    (dead / "adapter").mkdir(parents=True)
    add(store, "mine", source)
    assert leftovers(store) == []


def _add_many(folder, sources, names, start):
    store = AdapterStore(folder, grace_seconds=0)
    start.wait()
    for round_ in range(6):
        for name, source in zip(names, sources[round_ % 2 :] + sources, strict=False):
            add(store, name, source, replace=True)
        store.remove(names[-1])


def test_several_processes_at_once(store, tmp_path):
    """Without any grace: what one adds, another must not take for garbage."""
    sources = [write_bare_adapter(tmp_path / f"s{seed}", seed) for seed in range(3)]
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [
        # "shared" is fought over by all; the last name is removed by its owner alone.
        context.Process(
            target=_add_many, args=(store.folder, sources, ["shared", f"n{n}", f"x{n}"], start)
        )
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    known = [content(source) for source in sources]
    assert store.list().keys() == {"shared", *(f"n{n}" for n in range(4))}
    assert all(content(entry.path) in known for entry in store.list().values())
    store.clean(0)
    assert set(objects(store)) == {entry.path.name for entry in store.list().values()}
    assert leftovers(store) == []


# ---- the scan that a server polls


def test_signature_changes_with_the_content_only(store, source, other):
    add(store, "mine", source)
    plain = write_bare_adapter(store.folder / "plain")

    def signatures():
        return {n: e.signature for n, e in scan_adapters(store.folder).entries.items()}

    first = signatures()
    assert signatures() == first
    add(store, "other", other)
    add(store, "mine", source)
    assert {n: signatures()[n] for n in first} == first
    add(store, "mine", other, replace=True)
    second = signatures()
    assert second["mine"] == second["other"] != first["mine"]
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    assert signatures()["plain"] != first["plain"]
    assert {n: s for n, s in signatures().items() if n != "plain"} == {
        n: s for n, s in second.items() if n != "plain"
    }


def test_scan_of_many_opens_no_file(store, source, monkeypatch):
    add(store, "a0", source)
    target = os.readlink(store.folder / "a0")
    for number in range(1, 1000):
        (store.folder / f"a{number}").symlink_to(target)
    calls = []
    real = os.readlink
    monkeypatch.setattr(os, "readlink", lambda *a, **k: calls.append("readlink") or real(*a, **k))
    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, lambda *a, **k: pytest.fail("the scan must stay cheap"))
    monkeypatch.setattr(type(store.folder), "is_dir", lambda self: True)
    scan = scan_adapters(store.folder)
    monkeypatch.undo()
    assert len(scan.entries) == 1000
    assert len(calls) == 1000


def test_links_out_of_the_folder_are_refused(store, source, tmp_path):
    add(store, "mine", source)
    (store.folder / "away").symlink_to(tmp_path / "source")
    scan = scan_adapters(store.folder)
    assert list(scan.entries) == ["mine"]
    assert "symbolic link" in scan.refused["away"]
    with pytest.raises(ConfigError, match=r"out of .*adapters add away"):
        find_adapters(store.folder)
    (store.folder / "away").unlink()
    half = write_bare_adapter(store.folder / "half")
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(source / "adapter_model.safetensors")
    assert "symbolic link" in scan_adapters(store.folder).refused["half"]


def test_alias_within_the_folder(store, source):
    add(store, "mine", source)
    (store.folder / "prod").symlink_to("mine")
    entry = scan_adapters(store.folder).entries["prod"]
    assert entry.path.name == store.get("mine").path.name
    assert content(entry.path) == content(source)
