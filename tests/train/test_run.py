"""Whole training runs on tiny models."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.base.source import PREPARED_RECORD
from qlora_serve.errors import (
    BaseModelError,
    ConfigError,
    DataError,
    OutputError,
    QloraServeError,
    TrainError,
)
from qlora_serve.train import verify as verify_module
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.run import TrainResult, train
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, chat, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _settings(base: Path, data: Path, output: Path, **settings: Any) -> TrainSettings:
    chosen = {"learning_rate": 1e-2, "rank": 4, "alpha": 8, "device": "cpu", "max_steps": 6}
    return TrainSettings(base=str(base), data=data, output=output, **(chosen | settings))


def _train(*arguments: Any, **settings: Any) -> tuple[TrainResult, list[str]]:
    lines: list[str] = []
    return train(_settings(*arguments, **settings), lines.append), lines


def test_a_run_publishes_what_it_trained(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.Tensor] = []
    verify = verify_module.verify_saved

    def verify_and_remember(model: Any, folder: Path, *others: Any) -> None:
        verify(model, folder, *others)
        trained.append(_logits(model, others[2][0]))

    monkeypatch.setattr(verify_module, "verify_saved", verify_and_remember)
    result, lines = _train(base, data, tmp_path / "out", max_steps=None, epochs=5)
    metrics = result.metrics
    assert metrics["steps"] == 20
    assert metrics["last_loss"] < metrics["first_loss"] / 2

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in result.path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_serve.json",
        "recipe.yaml", "report.html",
        "training_log.json",
    ]  # fmt: skip
    manifest = read_adapter(result.path).manifest
    assert manifest is not None
    assert manifest == result.manifest
    assert manifest.base.unquantized == str(base)
    assert manifest.base.quantization == "none"
    assert manifest.data["rows"] == 16
    assert manifest.recipe["rank"] == 4
    assert manifest.stop_token_ids == [2]
    assert len(manifest.probes) == 8
    assert manifest.probes_from == "training rows"
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert any("count in the loss" in line for line in lines)
    assert any(f"qlora-serve merge {result.path}" in line for line in lines)

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untrained = _logits(plain, manifest.probes[0])
    found = _logits(PeftModel.from_pretrained(plain, result.path), manifest.probes[0])
    torch.testing.assert_close(found, trained[0], rtol=1e-5, atol=1e-5)
    assert float((found - untrained).abs().max()) > 1


@torch.no_grad()
def _logits(model: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits
    return logits


def test_the_same_seed_gives_the_same_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = {"seed": seed, "dropout": 0.1, "max_steps": 3}
        result, _ = _train(base, data, tmp_path / name, **settings)
        files.append((result.path / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_accumulation_gives_the_same_step(base: Path, data: Path, tmp_path: Path) -> None:
    adapters = []
    for name, micro, accumulation in (("a", 16, 1), ("b", 3, 6)):
        settings = {"micro_batch": micro, "accumulation": accumulation, "max_steps": 2}
        result, _ = _train(base, data, tmp_path / name, warmup_ratio=0, **settings)
        adapters.append((result, load_file(result.path / "adapter_model.safetensors")))
    (first, tensors), (second, others) = adapters
    assert first.metrics["first_loss"] == pytest.approx(second.metrics["first_loss"], rel=1e-5)
    assert first.metrics["last_loss"] == pytest.approx(second.metrics["last_loss"], rel=1e-3)
    assert tensors.keys() == others.keys()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_on_a_quantized_base(
    base: Path, data: Path, tmp_path: Path, quantization: str
) -> None:
    result, _ = _train(base, data, tmp_path / "out", quantization=quantization)
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    assert result.manifest.base.quantization == quantization
    assert result.manifest.base.unquantized == str(base)
    tensors = load_file(result.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_copy_quantized_on_disk_remembers_its_original(
    base: Path, data: Path, tmp_path: Path
) -> None:
    from qlora_serve.base.prepare import prepare_base

    copy = prepare_base(str(base), tmp_path / "copy", "nf4", lambda _: None)
    result, _ = _train(copy, data, tmp_path / "out", max_steps=1)
    assert result.manifest.base.unquantized == str(base)

    (copy / PREPARED_RECORD).unlink()
    result, lines = _train(copy, data, tmp_path / "unknown", max_steps=1)
    assert result.manifest.base.unquantized is None
    assert any("--unquantized-base names it" in line for line in lines)

    result, _ = _train(copy, data, tmp_path / "told", max_steps=1, unquantized_base=str(base))
    assert result.manifest.base.unquantized == str(base)
    with pytest.raises(BaseModelError, match="is quantized"):
        _train(copy, data, tmp_path / "wrong", unquantized_base=str(copy))


def test_checkpointing_gradients_changes_no_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    plain, _ = _train(base, data, tmp_path / "a", max_steps=2)
    saving, _ = _train(base, data, tmp_path / "b", max_steps=2, gradient_checkpointing=True)
    expected = load_file(plain.path / "adapter_model.safetensors")
    for name, tensor in load_file(saving.path / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_checkpoints_are_adapters_and_limited(base: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _train(base, data, output, save_every=2, keep=2)
    kept = sorted((tmp_path / "out.checkpoints").iterdir())
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-6"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, kept[0])
    last = load_file(kept[1] / "adapter_model.safetensors")
    published = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(last[name], published[name]) for name in published)
    shutil.rmtree(output)
    with pytest.raises(OutputError, match="checkpoints of an earlier run"):
        _train(base, data, output)
    assert not output.exists()


def test_long_rows_are_cut_dropped_and_counted(base: Path, tmp_path: Path) -> None:
    chats = [chat("hello", "world"), chat("a " * 60, "b"), chat("hello", "b " * 60)]
    data = write_chats(tmp_path / "d.jsonl", chats)
    result, lines = _train(base, data, tmp_path / "out", max_length=40, max_steps=1)
    counts = result.manifest.data
    assert (counts["rows"], counts["cut_rows"], counts["dropped_rows"]) == (2, 2, 1)
    assert any("2 rows were cut" in line and "1 row dropped" in line for line in lines)
    with pytest.raises(DataError, match="all 3 rows were cut to 5 tokens"):
        _train(base, data, tmp_path / "none", max_length=5)


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"base": "no/such/base/here"}, BaseModelError, "no base model at"),
        ({"data": Path("none.jsonl")}, DataError, "no data file"),
        ({"max_length": 4096}, ConfigError, "more than the 512 tokens"),
        ({"dtype": "float16"}, ConfigError, "float16"),
        ({"target_modules": "q_proj,query"}, ConfigError, "'query' match nothing.*k_proj"),
        ({"target_modules": r".*\.query"}, ConfigError, "match nothing"),
        ({"target_modules": "input_layernorm"}, ConfigError, "cannot be used"),
        ({"unquantized_base": "x"}, ConfigError, "is itself unquantized"),
        ({"learning_rate": 1e30, "max_grad_norm": 1e30}, TrainError, "the loss is .* at step"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(
    base: Path,
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[QloraServeError],
    reason: str,
) -> None:
    given = {"base": str(base), "data": data, "output": tmp_path / "out", "device": "cpu"}
    with pytest.raises(error, match=reason) as caught:
        train(TrainSettings(**(given | settings)), lambda _: None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_damaged_is_blamed_for_its_loss(
    base: Path, data: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = math.inf
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainError, match=r"step 1 .*the base itself gives it") as caught:
        _train(damaged, data, tmp_path / "out")
    assert "--learning-rate" not in str(caught.value)


def test_output_that_holds_something_is_left_alone(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds something"):
        _train(base, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_template_error_names_the_line(base: Path, tmp_path: Path) -> None:
    rows = [chat("a", "b"), [{"role": "tool", "content": "x"}, *chat("a", "b")]]
    data = write_chats(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=r"d.jsonl, line 2: the chat template refuses"):
        _train(base, data, tmp_path / "out")


@pytest.mark.parametrize("damage", ["tensor", "nan", "zero", "empty"])
def test_an_adapter_that_was_saved_wrong_is_not_published(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from safetensors.torch import save_file

    from qlora_serve.train import save as save_module

    save = save_module.save_adapter

    def save_wrong(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        if damage == "zero":
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
                    tensors[name].zero_()
        save(model, folder, tensors)
        file = folder / "adapter_model.safetensors"
        saved = load_file(file)
        first = sorted(saved)[0]
        if damage == "tensor":
            saved[first][0, 0] += 1e-7
        elif damage == "nan":
            saved[first][0, 0] = float("nan")
        elif damage == "empty":  # as ZeRO-3 leaves parameters that nobody gathered
            saved = {name: torch.empty(0) for name in saved}
        save_file(saved, file, metadata={"format": "pt"})

    monkeypatch.setattr(save_module, "save_adapter", save_wrong)
    reasons = {
        "tensor": "differs from the trained",
        "nan": "NaN",
        "zero": "changes nothing",
        "empty": "have another shape .* is 0, expected",
    }
    with pytest.raises(TrainError, match=reasons[damage]):
        _train(base, data, tmp_path / "out", max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked() -> None:
    good: dict[str, Any] = {"base": "b", "data": "d", "output": "o"}
    assert TrainSettings(**good, target_modules="q_proj, v_proj").target_modules == (
        "q_proj",
        "v_proj",
    )
    assert TrainSettings(**good, target_modules=".*q").target_modules == ".*q"
    bad = {"rank": 0, "dropout": 1.0, "epochs": 0, "target_modules": "(", "device": "tpu"}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            TrainSettings(**good, **{name: value})


def test_kernels_are_not_collected_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_serve.train.run import _keep_few_kernels

    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    _keep_few_kernels()
    kept = os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY"), os.environ["LRU_CACHE_CAPACITY"]
    assert kept == ("32", "7")
