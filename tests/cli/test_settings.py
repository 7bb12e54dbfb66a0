"""Flags and YAML keys are the same settings; flags win, and nothing unknown passes."""

from pathlib import Path

import pytest

from qlora_serve.errors import ConfigError, UsageError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.settings import load_settings, parse_bytes


def _yaml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path) -> None:
    file = _yaml(tmp_path, "base: one\nport: 9000\nmax-sequences: 3\nadapter: {a: dir/a}\n")
    settings = load_settings(ServeSettings, file, {"base": "two", "host": None})
    assert settings.base == "two"
    assert settings.port == 9000
    assert settings.max_sequences == 3
    assert settings.adapter == {"a": Path("dir/a")}
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: x\nprot: 1\nhots: y\n", "'hots' is not a setting"),
        ("base: x\nport: high\n", "port: input should be a valid integer"),
        ("base: x\nquantization: int3\n", "got 'int3'"),
        ("- base\n", "holds a list; expected keys and values"),
        ("base: [unclosed\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, said) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(ServeSettings, _yaml(tmp_path, text), {})
    assert said in str(caught.value)
    assert "serve.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="missing: --base"):
        load_settings(ServeSettings, None, {})


def test_settings_are_frozen() -> None:
    settings = load_settings(ServeSettings, None, {"base": "x"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("12", 12), ("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("512kb", 512_000)],
)
def test_sizes(text, size) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 apples", "1e9"])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)
