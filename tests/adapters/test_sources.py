"""Where adapters come from."""

import sys
import types

import pytest

from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError
from tests.bare_adapters import content, write_bare_adapter


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store")


def add(store, source):
    return store.add("mine", find_source(str(source)), str(source))


def test_checkpoint_of_a_trainer(store, tmp_path):
    source = write_bare_adapter(tmp_path / "run" / "checkpoint-20")
    wanted = content(source)
    left = ["optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"]
    for name in left:
        (source / name).write_text("x")
    (source / "global_step20").mkdir()
    (source / ".cache").mkdir()
    added = add(store, source)
    assert content(added.entry.path) == wanted
    assert sorted(added.left_out) == sorted([*left, "global_step20"])


@pytest.mark.parametrize("name", ["adapter_config.json", "README.md"])
def test_links_out_of_a_directory_are_refused(store, tmp_path, name):
    source = write_bare_adapter(tmp_path / "source")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(AdapterError, match=r"symbolic link to .*secret, out of"):
        add(store, source)
    assert store.list() == {}


def test_links_inside_a_directory_become_files(store, tmp_path):
    source = write_bare_adapter(tmp_path / "source")
    (source / "NOTES.md").symlink_to("adapter_config.json")
    entry = add(store, source).entry
    assert not (entry.path / "NOTES.md").is_symlink()
    assert (entry.path / "NOTES.md").read_bytes() == (source / "NOTES.md").read_bytes()


def test_snapshot_in_the_hubs_cache(store, tmp_path):
    """There every file is a link to ../../blobs."""
    repository = tmp_path / "models--org--name"
    blobs = write_bare_adapter(repository / "blobs")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert content(add(store, snapshot).entry.path) == content(blobs)
    (snapshot / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="symbolic link"):
        add(store, snapshot)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "no such directory or archive, and not a hub id"),
        ("a/b/c", "not a hub id"),
        ("org/name", r"the hub does not give it \(.+\)"),
        ("org/name@v1.0", "the hub does not give it"),
        ("modelscope:org/name", "pip install modelscope"),
    ],
)
def test_what_is_not_there(store, tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(AdapterError, match=words) as caught:
        add(store, source)
    assert "\n" not in str(caught.value)
    assert store.folder.exists() is False or store.list() == {}


def test_file_that_is_no_archive(tmp_path):
    (tmp_path / "weights.safetensors").write_text("x")
    with pytest.raises(AdapterError, match=r"is a file; expected .*\.zip"):
        find_source(str(tmp_path / "weights.safetensors"))


def test_hubs_are_asked_for_safe_files_only(store, tmp_path, monkeypatch):
    """The network is not there in a test: what would be asked of each hub's library is."""
    source = write_bare_adapter(tmp_path / "source")
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, local_dir):
        asked.append((name, revision))
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        write_bare_adapter(type(tmp_path)(local_dir))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert content(add(store, "org/name@v2").entry.path) == content(source)
    assert add(store, "modelscope:org/name").unchanged
    assert asked == [("org/name", "v2"), ("org/name", None)]
