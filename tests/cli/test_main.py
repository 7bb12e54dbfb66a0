"""The front door: quick help with examples, and one line for each mistake."""

import subprocess
import sys

import pytest

COMMANDS = [
    [], ["train"], ["serve"], ["merge"], ["adapters"], ["adapters", "list"], ["adapters", "show"],
    ["adapters", "check"], ["compare"], ["chat"], ["base"], ["base", "prepare"],
    ["data"], ["data", "check"],
    ["plan"], ["eval"], ["sweep"],
]  # fmt: skip

HEAVY = ("torch", "transformers", "peft", "datasets", "fastapi", "uvicorn", "numpy", "pandas")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "qlora_serve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples_and_loads_nothing_heavy(command) -> None:
    code = (
        "import sys, atexit\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print('LOADED', [m for m in heavy if m in sys.modules]))\n"
        f"sys.argv = ['qlora-serve', *{command!r}, '--help']\n"
        "from qlora_serve.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    if command not in (["adapters"], ["base"], ["data"]):
        assert "Examples:" in done.stdout
        assert f"qlora-serve {' '.join(command)}".strip() in done.stdout


def test_version() -> None:
    done = run("--version")
    assert done.stdout.startswith("qlora-serve 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serve"], 2, "missing: --base"),
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
def test_a_mistake_is_one_clear_line(arguments, code, said, tmp_path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert said in " ".join(done.stderr.split()).replace("│ ", "")
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert list(tmp_path.iterdir()) == []
