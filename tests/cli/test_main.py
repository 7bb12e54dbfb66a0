"""The front door: quick help with examples, and one line for each mistake."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from qlora_serve.cli.main import app, main

pytestmark = pytest.mark.usefixtures("logging_as_it_was")

HEAVY = ("torch", "transformers", "peft", "datasets", "fastapi", "uvicorn", "numpy", "pandas")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "qlora_serve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def commands(command=None, path=()) -> Iterator[tuple[tuple[str, ...], Any, bool]]:
    """Every command, its words before it, and whether it is a command of commands."""
    command = command or typer.main.get_command(app)
    yield path, command, isinstance(command, TyperGroup)
    if isinstance(command, TyperGroup):
        for name in command.list_commands(None):
            yield from commands(command.get_command(None, name), (*path, name))


def test_no_help_loads_anything_heavy() -> None:
    paths = [path for path, _, _ in commands()]
    assert len(paths) > 30
    code = (
        "import sys\n"
        "from qlora_serve.cli.main import app\n"
        f"for path in {paths!r}:\n"
        "    app([*path, '--help'], standalone_mode=False)\n"
        f"    print('LOADED', path, [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert loaded == [f"LOADED {path!r} []" for path in paths]


@pytest.mark.parametrize(
    ("path", "command", "is_group"), [pytest.param(*c, id=" ".join(c[0])) for c in commands()]
)
def test_help_shows_every_flag_whole_and_examples(path, command, is_group, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*path, "--help"]).stdout
    words = set(re.split(r"[\s,]+", shown))
    for parameter in command.params:
        is_flag = parameter.param_type_name == "option"
        assert words >= set(parameter.opts + parameter.secondary_opts if is_flag else ())
        assert is_flag or parameter.metavar in words
    assert max(len(line) for line in shown.splitlines() if not line.startswith("  --")) <= 80
    assert "..." not in shown.partition("Commands:")[2]
    if not is_group or not path:
        assert f"Examples:\n\n    {' '.join(['qlora-serve', *path])}" in shown


def test_version() -> None:
    done = run("--version")
    assert done.stdout.startswith("qlora-serve 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serve"], 2, "missing: BASE (on the command line"),
        (["train", "--base", "x"], 2, "missing: --data, --output"),
        (["dance"], 2, "No such command 'dance'"),
        (["serve", "x", "--port", "many"], 2, "unable to parse"),
        (["serve", "nothing-here"], 1, "error: no base model at 'nothing-here'"),
        (["serve", "x", "--port", "70000"], 1, "port: input should be less than or equal to 65535"),
        (["serve", "x", "--adapter", "broken"], 1, "expected NAME=DIR"),
        (["serve", "x", "--adapter", "a=b", "--adapter", "a=c"], 1, "'a' is given twice"),
        (["serve", "x", "--kv-memory", "lots"], 1, "expected a size such as 2GB"),
        (["serve", "x", "--config", "missing.yaml"], 1, "no config file at missing.yaml"),
        (["merge", "nothing-here", "--output", "y"], 1, "no adapter at nothing-here"),
        (["adapters", "show", "nothing-here"], 1, "no adapter at nothing-here"),
        (["compare", "hi", "--url", "http://127.0.0.1:9"], 1, "no server answers at http://127"),
        (["plan"], 2, "missing: --base"),
        (["plan", "--base", "nothing-here"], 1, "error: no base model at 'nothing-here'"),
        (["eval", "--base", "x"], 2, "missing: --data"),
        (["eval", "--base", "x", "--data", "none.jsonl"], 1, "no data file at none.jsonl"),
        (["sweep"], 2, "missing: --output, --recipe, --grid, --heldout"),
        (["base", "prepare", "unknown"], 1, "nothing to prepare for 'unknown'"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, code, said, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora-serve", *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    errors = capfd.readouterr().err
    assert ending.value.code == code
    assert said in errors
    assert "Traceback" not in errors
    if code == 1:
        assert len([line for line in errors.splitlines() if "error:" in line]) == 1
    assert list(tmp_path.iterdir()) == []
