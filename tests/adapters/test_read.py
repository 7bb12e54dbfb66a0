"""Reading an adapter's directory: what is broken is named."""

import json
from pathlib import Path

import pytest

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.folder import check_name, find_adapters
from qlora_serve.adapters.manifest import Manifest, ManifestBase, read_manifest, write_manifest
from qlora_serve.adapters.peft_config import parse_config
from qlora_serve.errors import AdapterError, ConfigError


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def to_model(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder / "config.json")


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


BROKEN = {
    "pickle": (to_pickle, "pickled weights"),
    "model": (to_model, "a whole model, not an adapter"),
    "no config": (remove("adapter_config.json"), "not a PEFT adapter"),
    "no weights": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "config not JSON": (write("adapter_config.json", b"{"), "cannot be read"),
    "config a list": (write("adapter_config.json", b"[]"), "no JSON object"),
    "config not UTF-8": (write("adapter_config.json", b"\xff"), "cannot be read"),
    "weights cut": (cut, "cut short"),
    "weights not safetensors": (write("adapter_model.safetensors", b"hello world"), "cannot be"),
    "header a list": (
        write("adapter_model.safetensors", (4).to_bytes(8, "little") + b"[1] "),
        "cannot be read",
    ),
    "header without offsets": (
        write("adapter_model.safetensors", (8).to_bytes(8, "little") + b'{"a":{}}'),
        "cannot be read",
    ),
    "manifest not JSON": (write("qlora_serve.json", b"{"), "qlora_serve.json cannot be read"),
    "manifest empty": (write("qlora_serve.json", b"{}"), "qlora_serve.json cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory_is_refused_in_one_line(adapter, case):
    spoil, words = BROKEN[case]
    spoil(adapter)
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_missing_directory(tmp_path):
    with pytest.raises(AdapterError, match="no such directory"):
        read_adapter(tmp_path / "none")


def test_manifest_round_trip_names_the_base(adapter):
    recorded = ManifestBase(
        name="b", fingerprint="sha256:0", quantization="nf4", dtype="float32", unquantized="u"
    )
    manifest = Manifest(base=recorded, probes=[[1, 2]], stop_token_ids=[2])
    write_manifest(adapter, manifest)
    assert read_manifest(adapter) == manifest
    assert read_adapter(adapter).base_name == "b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_new_thing": True}, "use_new_thing"),
        ({"layers_pattern": "x"}, "PEFT refuses adapter_config.json"),
    ],
)
def test_config_that_peft_would_misread_is_refused(adapter, changes, words):
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    with pytest.raises(AdapterError, match=words):
        parse_config(config)


def test_unknown_key_with_an_empty_value_is_harmless(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_new_thing": None}
    assert parse_config(config).r == 4


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "ä", "x" * 129])
def test_name_that_cannot_be_one(name):
    with pytest.raises(ConfigError):
        check_name(name)


def test_folder_of_adapters(adapter, tmp_path):
    (tmp_path / "other").mkdir()
    (adapter.rename(tmp_path / "one"))
    hidden = tmp_path / ".two.staging"
    hidden.mkdir()
    (hidden / "adapter_config.json").write_text("{}")
    assert find_adapters(tmp_path) == {"one": tmp_path / "one"}
    with pytest.raises(ConfigError, match="no folder"):
        find_adapters(tmp_path / "none")
