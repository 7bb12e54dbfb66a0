"""`qlora-serve train` as a person meets it: in a real process, on a real terminal."""

import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, command, quiet_environment, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _train_command(base: Path, data: Path, output: Path, *more: object) -> list[str]:
    fixed = ["--learning-rate", "1e-2", "--rank", 4, "--device", "cpu"]
    return command("train", "--base", base, "--data", data, "--output", output, *fixed, *more)


def _on_terminal(arguments: list[str], wait_for: str, number: signal.Signals) -> tuple[int, str]:
    """Runs a command on a pseudo-terminal, and signals it as soon as it has printed a pattern."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        arguments, stderr=theirs, stdout=theirs, env=quiet_environment(), start_new_session=True
    )
    os.close(theirs)
    seen, signalled = "", False
    try:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the last writer is gone
                break
            if not part:
                break
            seen += part.decode(errors="replace")
            if not signalled and re.search(wait_for, seen):
                signalled = True
                process.send_signal(number)
        return process.wait(), seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopping_leaves_a_usable_checkpoint_and_no_output(
    base: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = _train_command(base, data, tmp_path / "out", "--max-steps", 1_000_000)
    code, seen = _on_terminal(arguments, r"loss \d", number)
    assert code == 130, seen
    assert "Traceback" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
    (checkpoint,) = (tmp_path / "out.checkpoints").iterdir()
    assert f"its adapter is in {checkpoint}" in " ".join(seen.split())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, checkpoint)
    updates = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert any(bool(update.any()) for update in updates)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="output"),
        # The same in one process: test_resume.py.
        pytest.param(("--save-every", 1), marks=pytest.mark.slow, id="checkpoint"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_output(
    base: Path, data: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    # No file may grow beyond 8 KiB, which the configs need: the tensors do not fit. Set by a shell,
    # since a function between fork and exec would copy this whole process first.
    call = _train_command(base, data, tmp_path / "out", "--max-steps", 2, *more)
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *map(str, call)],
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(),
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_and_a_result_on_stdout(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {base}\ndata: {data}\nmax-steps: 50\nrank: 2\ntarget_modules: [q_proj]\n"
    )
    output = tmp_path / "out"
    done = subprocess.run(
        command("train", "--config", recipe, "--output", output, "--max-steps", 1),
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    assert "training" in done.stderr
    assert "%|" not in done.stderr  # nobody else's progress bar
    assert "WARNING" not in done.stderr  # nor their words: DeepSpeed's on machines with no GPU
    assert '"r": 2' in (output / "adapter_config.json").read_text()


def test_a_missing_file_is_answered_in_one_line(base: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _train_command(base, tmp_path / "none.jsonl", tmp_path / "out"),
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(),
    )
    assert done.returncode == 1
    assert done.stderr == f"error: no data file at {tmp_path}/none.jsonl\n"
