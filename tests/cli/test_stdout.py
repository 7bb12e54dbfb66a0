"""stdout is the result's alone, whatever the libraries under a command have to say."""

import json
import os
import subprocess
import sys

import pytest

from tests.tiny_models import write_random_adapter, write_tiny_model

_CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}

COMMANDS = {
    "plan": ["--base", "base", "--device", "cpu"],
    "eval": ["--base", "base", "--adapter", "a=a", "--data", "chats.jsonl", "--no-answers"],
    "merge": ["a", "--output", "merged"],
    "combine": ["a=0.5", "b=0.5", "--output", "both"],
    "fold": ["a", "--rank", "2", "--output", "folded"],
    "extract": ["other", "--base", "base", "--save-others", "--output", "extracted"],
    "adapters check": ["a"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, another model like it, two adapters and chats, named as in `COMMANDS`."""
    folder = tmp_path_factory.mktemp("stdout")
    base = write_tiny_model(folder / "base")
    write_tiny_model(folder / "other", seed=1)
    write_random_adapter(folder / "a", base)
    write_random_adapter(folder / "b", base, seed=2)
    (folder / "chats.jsonl").write_text(f"{json.dumps(_CHAT)}\n" * 4)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=() if name == "eval" else pytest.mark.slow, id=name)
        for name in COMMANDS
    ],
)
def test_it_holds_the_json_and_nothing_else(folder, command) -> None:
    arguments = [*command.split(), *COMMANDS[command], "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_serve.cli", *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_peft_leaves_the_process_as_it_was(folder) -> None:
    """It imports gptqmodel, which greets, moves the hub's cache and takes over the root logger.

    Not for adapters of a base without GPTQ layers.
    """
    code = (
        "import logging, os, sys, torch\n"
        "from pathlib import Path\n"
        "from qlora_serve.adapters.check import check_adapter\n"
        "from qlora_serve.base.gptq import before_peft\n"
        "before = {n: v for n, v in os.environ.items() if n.startswith(('HF_', 'TRANSFORMERS'))}\n"
        "check_adapter(Path('a'), None)\n"
        "assert 'gptqmodel' not in sys.modules\n"
        "before_peft()\n"
        "after = {n: v for n, v in os.environ.items() if n.startswith(('HF_', 'TRANSFORMERS'))}\n"
        "assert before == after, (before, after)\n"
        "assert 'gptqmodel' in sys.modules\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
