"""Finding a base, and saying what is wrong with what is there."""

import json

import pytest

from qlora_serve.base.source import locate_base
from qlora_serve.errors import BaseModelError


def write_config(folder, content):
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f / "nothing", "no such directory"),
        (lambda f: f / "file", "is a file"),
        (lambda f: f / "empty", "no config.json"),
        (lambda f: f / "adapter", "this is an adapter"),
        (lambda f: f / "broken", "cannot read"),
        (lambda f: f / "list", "no JSON object"),
        (lambda f: f / "untyped", "no model_type"),
    ],
)
def test_what_is_no_base_is_named_in_one_line(tmp_path, make, words):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write_config(tmp_path / "broken", "{")
    write_config(tmp_path / "list", "[]")
    write_config(tmp_path / "untyped", "{}")
    with pytest.raises(BaseModelError, match=words) as caught:
        locate_base(str(make(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(make(tmp_path)) in str(caught.value)


def test_prepared_name_that_is_not_prepared_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SERVE_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match="qlora-serve base prepare smollm2"):
        locate_base("smollm2")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, "none"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_quantization_is_read_from_the_config(tmp_path, settings, expected):
    config = {"model_type": "llama"} | ({"quantization_config": settings} if settings else {})
    folder = write_config(tmp_path / "base", json.dumps(config))
    assert locate_base(str(folder)).quantization == expected
