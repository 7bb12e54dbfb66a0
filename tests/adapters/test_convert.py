"""Pickled weights: converted when asked, refused when they hold more than tensors."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file

from qlora_serve.adapters import convert, pickle_worker
from qlora_serve.adapters.convert import convert_adapter
from qlora_serve.adapters.files import read_adapter
from qlora_serve.errors import AdapterError, OutputError
from tests.bare_adapters import bare_tensors, write_bare_adapter


@pytest.fixture
def pickled(tmp_path):
    folder = write_bare_adapter(tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(bare_tensors(), folder / "adapter_model.bin")
    return folder


def refuse(source, target, words):
    with pytest.raises(AdapterError, match=words) as caught:
        convert_adapter(source, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def in_process(monkeypatch):
    """Runs the worker's code here: starting a process with torch takes seconds."""

    def run(pickle_file, output):
        answer = pickle_worker.convert(str(pickle_file), str(output))
        if "error" in answer:
            raise AdapterError(f"{pickle_file} cannot be converted: {answer['error']}")

    monkeypatch.setattr(convert, "_run_worker", run)


@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tensors_come_out_as_peft_reads_them(pickled, tmp_path, zipped):
    tensors = bare_tensors()
    first = min(tensors)
    tensors[first] = tensors[first].bfloat16()
    whole = torch.arange(16.0)
    tensors["shared.a"], tensors["shared.b"] = whole[:8], whole[4:].view(3, 4).T
    file = pickled / "adapter_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    (pickled / "README.md").write_text("a card")
    (pickled / "optimizer.pt").write_text("x")
    with pytest.raises(AdapterError, match=r"pickled weights .*adapters convert"):
        read_adapter(pickled)
    left_out = convert_adapter(pickled, tmp_path / "new")
    assert left_out == ["optimizer.pt"]
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    expected = load_peft_weights(str(pickled))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor)
    assert (tmp_path / "new" / "README.md").read_text() == "a card"
    assert (tmp_path / "new" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


_SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("old", "bare pickle")]


@pytest.mark.parametrize("form", ["zip", *_SLOW])
def test_code_in_a_pickle_does_not_run(pickled, tmp_path, form):
    marker = tmp_path / "it ran"
    evil = bare_tensors() | {"x": _Evil(marker)}
    file = pickled / "adapter_model.bin"
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(_Evil(marker)))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=form == "zip")
    refuse(pickled, tmp_path / "new", "cannot be converted")
    assert not marker.exists()
    if form == "zip":  # it was armed
        torch.load(file, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "holds a dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch': int, expected a tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no plain tensor"),
        ({1: torch.ones(1)}, "expected a tensor"),
    ],
)
def test_what_is_no_checkpoint(pickled, tmp_path, in_process, content, words):
    torch.save(content, pickled / "adapter_model.bin")
    refuse(pickled, tmp_path / "new", words)


def test_broken_pickle(pickled, tmp_path, in_process):
    file = pickled / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    refuse(pickled, tmp_path / "new", "cannot be converted")
    file.write_bytes(b"nothing")
    refuse(pickled, tmp_path / "new", "cannot be converted")


@pytest.mark.slow
def test_small_file_that_unpacks_to_gigabytes(pickled, tmp_path):
    """torch's files are zips, whose records may be compressed."""
    plain = io.BytesIO()
    size = 1 << 29
    torch.save({"a": torch.zeros(1)}, plain)
    file = pickled / "adapter_model.bin"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data/0"):
                with new.open(info.filename, "w", force_zip64=True) as stream:
                    for _ in range(size >> 24):
                        stream.write(bytes(1 << 24))
                continue
            if info.filename.endswith("data.pkl"):
                # The tensor's element count and its storage's, both 1, become 2**27.
                data = data.replace(b"K\x01tq", b"J\x00\x00\x00\x08tq")
            new.writestr(info.filename, data)
    assert file.stat().st_size < size // 500
    refuse(pickled, tmp_path / "new", "more memory")


def test_slow_pickle_is_ended(pickled, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_WALL_SECONDS", 0.01)
    refuse(pickled, tmp_path / "new", "was not read within")


def test_what_needs_no_conversion(pickled, tmp_path):
    refuse(write_bare_adapter(tmp_path / "fine"), tmp_path / "new", "nothing is to be converted")
    refuse(tmp_path / "none", tmp_path / "new", "no such directory")
    (pickled / "adapter_config.json").unlink()
    refuse(pickled, tmp_path / "new", "no adapter_config.json")
    (pickled / "adapter_model.bin").unlink()
    refuse(pickled, tmp_path / "new", "no adapter_model.bin")


def test_output_that_is_taken(pickled, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("x")
    with pytest.raises(OutputError, match="already holds something"):
        convert_adapter(pickled, tmp_path / "new")


def test_pickle_that_is_a_link_out_is_refused(pickled, tmp_path):
    (pickled / "adapter_model.bin").rename(tmp_path / "elsewhere.bin")
    (pickled / "adapter_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    refuse(pickled, tmp_path / "new", "symbolic link")


def test_archive_of_a_pickled_adapter(pickled, tmp_path, in_process):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in pickled.iterdir():
            opened.write(file, f"inside/{file.name}")
    convert_adapter(archive, tmp_path / "new")
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in bare_tensors().items())
