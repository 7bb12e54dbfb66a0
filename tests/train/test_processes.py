"""Several processes and DeepSpeed, for real: two of them on this machine's CPU."""

import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_serve.errors import ConfigError
from qlora_serve.train.checkpoints import find_checkpoints
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.log import read_log
from qlora_serve.train.run import train
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, command, quiet_environment, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _settings(base: Path, data: Path, output: Path, **settings: Any) -> TrainSettings:
    chosen = {
        "learning_rate": 1e-2, "rank": 4, "device": "cpu", "max_steps": 4, "micro_batch": 2,
        "group_by_length": False,
    }  # fmt: skip
    return TrainSettings(base=str(base), data=data, output=output, **(chosen | settings))


def _alone(base: Path, data: Path, output: Path, **settings: Any) -> Path:
    """The same steps in one process: a micro-batch of both processes' rows."""
    return train(_settings(base, data, output, micro_batch=4, **settings), lambda _: None).path


def _command(settings: TrainSettings, *more: object) -> list[str]:
    config = settings.output.with_suffix(".json")
    config.write_text(settings.model_dump_json())
    return command("train", "--config", config, *more)


def _run(settings: TrainSettings, *more: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        _command(settings, *more),
        capture_output=True,
        text=True,
        check=False,
        env=quiet_environment(),
    )


def _require_same_form(found: Path, expected: Path) -> None:
    """Keys, shapes, dtypes and config are those of the other adapter; all numbers are finite."""
    tensors, others = (load_file(p / "adapter_model.safetensors") for p in (found, expected))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in others.items()
    }
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    configs = [json.loads((p / "adapter_config.json").read_text()) for p in (found, expected)]
    assert configs[0] == configs[1]
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())


@pytest.mark.parametrize(
    ("deepspeed", "more"),
    [
        ("zero2", {}),
        pytest.param("zero3", {"modules_to_save": ("lm_head",)}, marks=pytest.mark.slow),
        pytest.param(None, {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param(
            "zero2-offload", {"accumulation": 2, "micro_batch": 1}, marks=pytest.mark.slow
        ),
        pytest.param("zero3-offload", {}, marks=pytest.mark.slow),
        pytest.param("zero2", {"quantization": "nf4"}, marks=pytest.mark.slow),
        (None, {"fsdp": True, "modules_to_save": ("lm_head",)}),
        pytest.param(
            None,
            {"fsdp": True, "gradient_checkpointing": True, "sample_prompt": ("Where?",)},
            marks=pytest.mark.slow,
        ),
        pytest.param(None, {"fsdp": True, "packing": True}, marks=pytest.mark.slow),
        pytest.param("zero2", {"loraplus_ratio": 4.0, "packing": True}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_adapter_of_one(
    base: Path, data: Path, tmp_path: Path, deepspeed: str | None, more: dict[str, Any]
) -> None:
    settings = _settings(
        base, data, tmp_path / "two", processes=2, deepspeed=deepspeed, save_every=4, **more
    )
    done = _run(settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{settings.output}\n"
    assert done.stderr.count("count in the loss") == 1  # one process speaks
    same = {
        name: value
        for name, value in more.items()
        if name not in ("micro_batch", "accumulation", "fsdp")
    }
    alone = _alone(base, data, tmp_path / "one", **same)
    _require_same_form(settings.output, alone)
    if not more.get("packing"):
        assert read_log(settings.output).losses == pytest.approx(read_log(alone).losses, rel=1e-4)
    logits = []
    for folder in (settings.output, settings.checkpoints / "checkpoint-4", alone):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.arange(20)[None]
            logits.append(PeftModel.from_pretrained(model, folder)(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[1])
    if not more.get("packing"):
        torch.testing.assert_close(logits[0], logits[2], rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["zero2", "zero3", "fsdp", None])
def test_two_processes_go_on_exactly(
    base: Path, data: Path, tmp_path: Path, split: str | None
) -> None:
    how: dict[str, Any] = {"fsdp": True} if split == "fsdp" else {"deepspeed": split}
    more = {"processes": 2, "dropout": 0.2, "max_steps": 30, **how}
    whole = _settings(base, data, tmp_path / "whole", **more)
    assert _run(whole).returncode == 0
    settings = _settings(base, data, tmp_path / "out", save_every=1, keep=100, **more)
    process = subprocess.Popen(
        _command(settings), env=quiet_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            break
    while len(find_checkpoints(settings.checkpoints)) < 2:
        try:
            process.wait(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            continue
    process.kill()  # its workers die with it
    process.stderr.read()
    process.wait()
    reached = find_checkpoints(settings.checkpoints)
    assert reached
    if settings.output.exists():
        pytest.skip("the run was over before it could be killed")
    again = _run(settings, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
    expected = read_log(whole.output).losses
    assert read_log(settings.output).losses == pytest.approx(expected, abs=1e-6)


def _workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "qlora_serve.train.worker" in " ".join(child.cmdline())][
        -2:
    ]


@pytest.mark.slow
def test_one_process_that_dies_ends_all_with_one_error(
    base: Path, data: Path, tmp_path: Path
) -> None:
    settings = _settings(base, data, tmp_path / "out", processes=2, max_steps=100_000)
    process = subprocess.Popen(
        _command(settings), env=quiet_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    workers: list[psutil.Process] = []
    for line in process.stderr:
        if line.startswith("training"):
            workers = _workers(process)
            workers[-1].send_signal(signal.SIGKILL)
            break
    rest = process.stderr.read()
    assert process.wait() == 1
    errors = [line for line in rest.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "a training process ended without a word" in errors[0]
    assert not any(worker.is_running() for worker in workers)
    assert not settings.output.exists()


@pytest.mark.slow
def test_an_error_in_all_processes_is_said_once(base: Path, data: Path, tmp_path: Path) -> None:
    settings = _settings(base, data, tmp_path / "out", processes=2, target_modules="query")
    done = _run(settings)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "'query' match nothing" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sigterm_stops_both_at_the_same_step(base: Path, data: Path, tmp_path: Path) -> None:
    settings = _settings(
        base, data, tmp_path / "out", processes=2, deepspeed="zero2", max_steps=100_000
    )
    process = subprocess.Popen(
        _command(settings), env=quiet_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "go on with the same command and --resume" in rest
    assert "Traceback" not in rest
    (checkpoint,) = find_checkpoints(settings.checkpoints)
    assert len(read_log(checkpoint).losses) == int(checkpoint.name[11:])


@pytest.mark.slow
def test_two_machines(base: Path, data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"nodes": 2, "rendezvous": f"127.0.0.1:{port}"}
    first, second = (
        subprocess.Popen(
            command("train", "--config", _config(tmp_path, base, data, node, more)),
            env=quiet_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    )
    assert first.communicate()[1] is not None
    said = second.communicate()[1]
    assert (first.returncode, second.returncode) == (0, 0), said
    alone = _alone(base, data, tmp_path / "one")
    _require_same_form(tmp_path / "out", alone)


def _config(folder: Path, base: Path, data: Path, node: int, more: dict[str, Any]) -> Path:
    settings = _settings(base, data, folder / "out", node_rank=node, **more)
    file = folder / f"node{node}.json"
    file.write_text(settings.model_dump_json())
    return file


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"deepspeed": "zero3", "quantization": "nf4"}, "packed nf4 weights do not allow"),
        ({"deepspeed": "zero3", "init": "pissa"}, "pissa looks at whole weights"),
        ({"deepspeed": "zero9"}, "expected one of zero2, zero3"),
        ({"fsdp": True, "quantization": "nf4"}, "packed nf4 weights do not allow"),
        ({"fsdp": True, "init": "olora"}, "olora is converted with whole weights"),
        ({"fsdp": True, "add_tokens": ("[new]",)}, "the enlarged embeddings are saved whole"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        train(_settings(base, data, tmp_path / "out", processes=2, **settings), lambda _: None)
    assert list(tmp_path.iterdir()) == []
