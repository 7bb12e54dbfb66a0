"""A run that was stopped goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.errors import OutputError, TrainError
from qlora_serve.train import trainer as trainer_module
from qlora_serve.train.checkpoints import find_checkpoints, newest_whole
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.log import read_log
from qlora_serve.train.run import train
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, command, quiet_environment, write_chats

STEPS = 9  # of 4 an epoch: the run is stopped in the middle of the second


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _settings(base: Path, data: Path, output: Path, **settings: Any) -> TrainSettings:
    # Dropout makes the random state matter, and the schedule the scheduler's.
    chosen = {
        "learning_rate": 1e-2, "rank": 4, "device": "cpu", "max_steps": STEPS, "dropout": 0.2,
        "schedule": "cosine", "warmup_ratio": 0.3, "save_every": 1, "keep": 100,
    }  # fmt: skip
    return TrainSettings(base=str(base), data=data, output=output, **(chosen | settings))


def _train(settings: TrainSettings) -> list[float]:
    return read_log(train(settings, lambda _: None).path).losses


class _Stopped(Exception):
    pass


def _stop_after(settings: TrainSettings, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run right after a step, as a crash would, with whatever was saved by then."""
    save = trainer_module.OurTrainer._save_checkpoint

    def save_and_stop(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == step:
            raise _Stopped

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.OurTrainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(_Stopped):
            train(settings, lambda _: None)


_LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ({}, 4),
        ({"quantization": "nf4", "accumulation": 3, "micro_batch": 2}, 5),
        pytest.param({}, 6, marks=_LONG),
        pytest.param({"quantization": "nf4"}, 6, marks=_LONG),
        pytest.param({"init": "pissa"}, 6, marks=_LONG),
        pytest.param({"use_dora": True, "modules_to_save": ("lm_head",)}, 6, marks=_LONG),
        pytest.param({"method": "full", "learning_rate": 1e-3}, 6, marks=_LONG),
        pytest.param(
            {"loraplus_ratio": 4.0, "optimizer": "adamw-8bit", "bias": "all"}, 6, marks=_LONG
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_losses_are_those_of_an_unbroken_run(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    step: int,
) -> None:
    expected = _train(_settings(base, data, tmp_path / "whole", **method))
    assert len(expected) == STEPS
    settings = _settings(base, data, tmp_path / "out", **method)
    _stop_after(settings, step, monkeypatch)
    assert not settings.output.exists()
    found = _train(settings.model_copy(update={"resume": True}))
    assert found == pytest.approx(expected, abs=1e-6)
    name = "model.safetensors" if "method" in method else "adapter_model.safetensors"
    whole = load_file(tmp_path / "whole" / name)
    for key, tensor in load_file(settings.output / name).items():
        torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-6)


# Kills the process that trains, in step 6: on its way through the model, or when the checkpoint is
# half written.
_KILL_ITSELF = """
import os, signal, sys
from qlora_serve.cli import main as cli
from qlora_serve.train import trainer
method = sys.argv.pop(1)
original = getattr(trainer.OurTrainer, method)
def kill(self, *arguments, **named):
    if self.state.global_step == (5 if method == "compute_loss" else 6):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **named)
setattr(trainer.OurTrainer, method, kill)
cli.main()
"""


@pytest.mark.parametrize("method", [pytest.param("compute_loss", marks=_LONG), "_save_rng_state"])
def test_a_killed_run_goes_on(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    settings = _settings(base, data, tmp_path / "out", save_every=2)
    config = tmp_path / "recipe.json"
    config.write_text(settings.model_dump_json())
    killed = subprocess.run(
        [sys.executable, "-c", _KILL_ITSELF, method, "train", "--config", str(config)],
        env=quiet_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = newest_whole(settings.checkpoints)
    assert newest is not None
    assert newest.name == "checkpoint-4"
    half_written = list(settings.checkpoints.glob(".*"))
    assert bool(half_written) == (method == "_save_rng_state")
    found = _train(settings.model_copy(update={"resume": True}))
    assert found == pytest.approx(_train(_settings(base, data, tmp_path / "whole")), abs=1e-6)
    assert not list(settings.checkpoints.glob(".*"))


def test_a_checkpoint_is_an_adapter_of_its_own(base: Path, data: Path, tmp_path: Path) -> None:
    settings = _settings(base, data, tmp_path / "out", init="olora", max_steps=3)
    train(settings, lambda _: None)
    checkpoint = settings.checkpoints / "checkpoint-3"
    adapter = read_adapter(checkpoint)
    assert adapter.manifest is not None
    assert adapter.manifest.metrics["steps"] == 3
    logits = []
    for folder in (checkpoint, settings.output):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        probe = torch.tensor([adapter.manifest.probes[0]])
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(model, folder)(input_ids=probe).logits)
    torch.testing.assert_close(logits[0], logits[1])


def test_a_changed_run_is_refused_by_name(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(base, data, tmp_path / "out")
    _stop_after(settings, 2, monkeypatch)
    with pytest.raises(OutputError, match="go on with it by --resume"):
        train(settings, lambda _: None)
    again = {"resume": True}
    changed = settings.model_copy(update=again | {"rank": 8, "schedule": "linear"})
    with pytest.raises(
        TrainError, match=r'rank was 4 and is 8, schedule was "cosine" and is "linear"'
    ):
        train(changed, lambda _: None)
    other_data = write_chats(tmp_path / "other.jsonl", SOME_CHATS[:12])
    with pytest.raises(TrainError, match="the data changed"):
        train(settings.model_copy(update=again | {"data": (str(other_data),)}), lambda _: None)
    other_base = write_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(TrainError, match="the base's weights changed"):
        train(settings.model_copy(update=again | {"base": str(other_base)}), lambda _: None)
    # Where things are and how often they are saved may change.
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    free = {"data": (str(moved),), "save_every": 5, "keep": 1}
    train(settings.model_copy(update=again | free), lambda _: None)


def test_a_broken_checkpoint_is_passed_over(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(base, data, tmp_path / "out")
    _stop_after(settings, 4, monkeypatch)
    weights = settings.checkpoints / "checkpoint-4" / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (settings.checkpoints / "checkpoint-3" / "run.json").write_text("{")
    newest = newest_whole(settings.checkpoints)
    assert newest is not None
    assert newest.name == "checkpoint-2"
    shutil.rmtree(newest)
    shutil.rmtree(settings.checkpoints / "checkpoint-1")
    with pytest.raises(OutputError, match="holds no whole checkpoint"):
        train(settings.model_copy(update={"resume": True}), lambda _: None)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _train(_settings(base, data, tmp_path / "whole"))
    settings = _settings(base, data, tmp_path / "out")
    save = trainer_module.OurTrainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.OurTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            OutputError, match=r"disk is full.*last good checkpoint is .*checkpoint-3.*--resume"
        ):
            train(settings, lambda _: None)
    assert not list(settings.checkpoints.glob(".*"))
    assert _train(settings.model_copy(update={"resume": True})) == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_whose_weights_give_no_loss_is_not_called_good(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(base, data, tmp_path / "out")
    _stop_after(settings, 3, monkeypatch)
    spoilt = settings.checkpoints / "checkpoint-3" / "adapter_model.safetensors"
    save_file({name: tensor / 0 for name, tensor in load_file(spoilt).items()}, spoilt)
    with pytest.raises(TrainError, match=r"the loss is nan at step 4 .*good.*checkpoint-2$"):
        train(settings.model_copy(update={"resume": True}), lambda _: None)

    diverging = _settings(base, data, tmp_path / "new", learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(TrainError, match="the loss is nan at step 2 ") as caught:
        train(diverging, lambda _: None)
    assert (diverging.checkpoints / "checkpoint-1").is_dir()
    assert "checkpoint" not in str(caught.value)


def test_sigterm_says_how_to_go_on(base: Path, data: Path, tmp_path: Path) -> None:
    settings = _settings(base, data, tmp_path / "out", save_every=None, max_steps=100_000)
    config = tmp_path / "recipe.json"
    config.write_text(settings.model_dump_json())
    environment = quiet_environment()
    process = subprocess.Popen(
        command("train", "--config", config), env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "go on with the same command and --resume" in rest
    (checkpoint,) = find_checkpoints(settings.checkpoints)
    assert json.loads((checkpoint / "run.json").read_text())["rank"] == 4
    assert len(read_log(checkpoint).losses) == int(checkpoint.name[11:])
