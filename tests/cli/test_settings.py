"""Flags and YAML keys are the same settings; flags win, and nothing unknown passes."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qlora_serve.cli.options import flags_from
from qlora_serve.errors import ConfigError, UsageError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.settings import load_settings, parse_bytes
from qlora_serve.train.config import TrainSettings


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


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        (("q_proj,v_proj",), ("q_proj", "v_proj")),
        (("q_proj", "v_proj"), ("q_proj", "v_proj")),
        (("q_proj, k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")),
        (("all-linear",), "all-linear"),
        ((r".*\.3\..*_proj",), r".*\.3\..*_proj"),
        ((), "all-linear"),
    ],
)
def test_no_name_of_a_module_is_lost(flags: tuple[str, ...], modules: object) -> None:
    taken: list[TrainSettings] = []
    app = typer.Typer()
    app.command()(flags_from(TrainSettings)(taken.append))
    given = [part for flag in flags for part in ("--target-modules", flag)]
    done = CliRunner().invoke(app, ["--base", "b", "--data", "d", "--output", "o", *given])
    assert done.exit_code == 0, done.output
    assert taken[0].target_modules == modules


def test_a_pattern_among_names_is_refused() -> None:
    given = {"base": "b", "data": ["d"], "output": "o", "target_modules": ["q_proj", "all-linear"]}
    with pytest.raises(ConfigError, match="all must be names, not all-linear"):
        load_settings(TrainSettings, None, given)


def test_a_wrong_value_has_the_name_that_its_user_gave_it(tmp_path) -> None:
    file = _yaml(tmp_path, "base: x\nport: high\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(ServeSettings, file, {"max_sequences": "many", "quantization": "int3"})
    named = [one.split(": ")[:2] for one in str(caught.value).split("; ")]
    assert [str(file), "port"] in named
    assert {name for name, _ in named} == {str(file), "--max-sequences", "--quantization"}


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
