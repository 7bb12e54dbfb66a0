"""The shipped recipes, each run with its own figures on a small model of its kind."""

import csv
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.adapters.manifest import read_manifest
from qlora_serve.errors import ConfigError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from qlora_serve.settings import load_settings
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.log import read_log
from qlora_serve.train.plan.config import PlanSettings
from qlora_serve.train.plan.estimate import Planner, plan
from qlora_serve.train.run import train
from qlora_serve.train.sweep import best, points, sweep
from qlora_serve.train.sweep_config import SweepSettings
from tests.gptq_models import write_gptq_model
from tests.server_process import running_server
from tests.tiny_models import write_tiny_model
from tests.train.chats import command, quiet_environment

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QWEN = {
    "rank": 64, "alpha": 16, "dropout": 0.05, "bias": "none", "target_modules": SEVEN,
    "epochs": 5, "micro_batch": 2, "accumulation": 8, "learning_rate": 3e-4, "weight_decay": 0.1,
    "adam_beta2": 0.95, "warmup_ratio": 0.01, "schedule": "cosine", "max_length": 512,
    "gradient_checkpointing": True, "save_every": 1000, "keep": 10, "tokenization": "lazy",
    "dtype": "bfloat16",
}  # fmt: skip
FIGURES: dict[str, dict[str, Any]] = {
    "qwen-chat-lora": QWEN,
    "qwen-base-lora": QWEN | {"modules_to_save": ("embed_tokens", "lm_head")},
    "qwen-int4-qlora-zero2": QWEN
    | {"processes": 2, "deepspeed": "zero2", "micro_batch": 1, "accumulation": 16,
       "learning_rate": 1e-5, "dtype": "float16"},
    "llama2-nf4": {
        "rank": 64, "alpha": 16, "dropout": 0.1, "quantization": "nf4",
        "double_quantization": False, "dtype": "float16",
    },
    "cmqa-medical": QWEN,
    "qwen2.5-tagging": {
        "rank": 8, "alpha": 32, "dropout": 0.1, "target_modules": SEVEN, "micro_batch": 4,
        "accumulation": 4, "epochs": 4, "learning_rate": 1e-4, "max_length": 384,
        "train_on": "assistant", "sample_rows": 5, "track": ("swanlab",), "dtype": "bfloat16",
    },
    "qwen2-docs-sft": {
        "method": "lora", "quantization": "none", "double_quantization": True,
        "tokenization": "lazy", "eval_data": "docs.eval.jsonl",
    },
}  # fmt: skip
QUESTIONS = [f"question {number} {'lazy dog ' * (number % 4)}" for number in range(16)]
ANSWERS = [f"answer {number % 3} world" for number in range(16)]


def _recipe(name: str, **swapped: Any) -> TrainSettings:
    given = {"output": "out", "device": "cpu"} | swapped
    return load_settings(TrainSettings, RECIPES / f"{name}.yaml", given)


@pytest.mark.parametrize("name", FIGURES)
def test_a_recipe_holds_its_figures(name: str) -> None:
    recipe = _recipe(name)
    assert {key: getattr(recipe, key) for key in FIGURES[name]} == FIGURES[name]


@pytest.mark.parametrize("name", [*FIGURES, "tagging-lora", "tickets-qlora"])
def test_a_recipe_can_be_planned(name: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    settings = load_settings(PlanSettings, RECIPES / f"{name}.yaml", {"base": str(base)})
    assert plan(Planner(settings)).parameters.trainable > 0


def _conversations(path: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}
        for asked, said in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


def _lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _trained(settings: TrainSettings) -> tuple[Any, list[str]]:
    lines: list[str] = []
    result = train(settings, lines.append)
    log = read_log(result.path)
    assert all(step.grad_norm > 0 for step in log.steps)
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    return result, lines


@torch.no_grad()
def _logits(base: Path, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    logits: torch.Tensor = model.eval()(input_ids=tokens).logits
    return logits


@pytest.mark.slow
def test_qwen_chat_lora(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    data = _conversations(tmp_path / "belle.json")
    result, lines = _trained(
        _recipe("qwen-chat-lora", base=str(base), data=data, output=tmp_path / "out")
    )
    assert any("belle.json is conversations, 16 rows" in line for line in lines)
    assert len(read_log(result.path).steps) == 5  # of 16 rows each
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (64, 16, "none")
    assert sorted(config["target_modules"]) == sorted(SEVEN)


@pytest.mark.slow
def test_qwen_base_lora_teaches_the_chat_tokens(tmp_path: Path) -> None:
    """The template's end token has an empty row in the base, and not in the adapter."""
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    data = _conversations(tmp_path / "belle.json")
    swapped = {"base": str(base), "data": data}
    lines: list[str] = []
    train(_recipe("qwen-chat-lora", output=tmp_path / "without", **swapped), lines.append)
    flags = "--modules-to-save embed_tokens --modules-to-save lm_head"
    assert any("has never learnt <|im_end|>" in line and flags in line for line in lines)
    result, lines = _trained(_recipe("qwen-base-lora", output=tmp_path / "out", **swapped))
    assert not any("has never learnt" in line for line in lines)
    saved = load_file(result.path / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        trained = saved[f"base_model.model.{name}"]
        assert trained.shape == stored[name].shape
        assert not torch.equal(trained[2].float(), stored[name][2])


@pytest.mark.slow
def test_qwen_int4_qlora_on_two_processes_merges_into_the_unquantized_sibling(
    tmp_path: Path,
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("deepspeed")
    sibling = write_tiny_model(tmp_path / "sibling", "llama-untied")
    base = write_gptq_model(tmp_path / "int4", sibling)
    output = tmp_path / "out"
    done = subprocess.run(
        command(
            "train", "--config", RECIPES / "qwen-int4-qlora-zero2.yaml", "--base", base,
            "--unquantized-base", sibling, "--data", _conversations(tmp_path / "belle.json"),
            "--output", output, "--device", "cpu", "--dtype", "float32",
        ),
        capture_output=True, text=True, check=False, env=quiet_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = read_log(output)
    assert log.environment["processes"] == 2
    assert len(log.steps) == 5
    assert log.losses[-1] < log.losses[0]
    manifest = read_manifest(output)
    assert manifest is not None
    assert (manifest.base.quantization, manifest.base.unquantized) == ("gptq", str(sibling))
    merged = tmp_path / "merged"
    report = merge_adapter(
        MergeSettings(adapter=output, output=merged, dtype="float16", max_shard_size="2048MB")
    )
    assert report.base == str(sibling)
    assert not list(merged.glob("*.bin"))
    tokens = torch.arange(3, 40)[None]
    expected = _logits(sibling, output, tokens)
    error = (_logits(merged, None, tokens) - expected).abs().max()
    assert error < 0.05 * expected.std()


@pytest.mark.slow
def test_llama2_nf4_learns_the_end_that_is_also_its_padding(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    texts = [
        f"<|endoftext|>[INST] {asked} [/INST] {said} <|im_end|>"
        for asked, said in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    data = _lines(tmp_path / "guanaco.jsonl", [{"text": text} for text in texts])
    swapped = {"base": str(base), "data": data, "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match="float16 gradients vanish on a CPU"):
        train(_recipe("llama2-nf4", **swapped), lambda _: None)
    # No answer but an end: only where the end is in the loss does its probability rise.
    rate = {"learning_rate": 1e-2, "max_steps": 12}
    result, lines = _trained(_recipe("llama2-nf4", dtype="float32", **swapped, **rate))
    assert any("guanaco.jsonl is text, 16 rows" in line for line in lines)
    assert not any("no end token" in line for line in lines)
    assert result.manifest.base.quantization == "nf4"
    tokens = tokenizer(texts[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tokens[0, -1] == 2
    before, after = (
        _logits(base, adapter, tokens)[0, -2].log_softmax(-1)[2] for adapter in (None, result.path)
    )
    assert after > before + 1
    merged = tmp_path / "merged"
    merge_adapter(MergeSettings(adapter=result.path, output=merged, dtype="float16"))
    expected = _logits(base, result.path, tokens)
    assert (_logits(merged, None, tokens) - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.slow
def test_a_checkpoint_of_cmqa_medical_is_served_and_merged(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    with (tmp_path / "cmqa.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *zip(QUESTIONS, ANSWERS, strict=True)])
    # A large rate, so that few steps tell.
    swapped = {"base": str(base), "data": tmp_path / "cmqa.csv", "output": tmp_path / "out"}
    _trained(_recipe("cmqa-medical", save_every=2, learning_rate=3e-2, **swapped))
    found = sorted(path.name for path in (tmp_path / "out.checkpoints").iterdir())
    assert found == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]  # and the last
    checkpoint = tmp_path / "out.checkpoints" / "checkpoint-2"

    with running_server(base, "--adapter", f"early={checkpoint}", "--device", "cpu") as url:
        compared = subprocess.run(
            command(
                "compare", QUESTIONS[0], "--variants", "base,early", "--url", url, "--json",
                "--max-tokens", 8,
            ),
            capture_output=True, text=True, check=False, env=quiet_environment(),
        )  # fmt: skip
        assert compared.returncode == 0, compared.stderr
        assert httpx.get(f"{url}/v1/models").json()["data"][1]["id"] == "early"
    answers = json.loads(compared.stdout)
    assert "early" in json.dumps(answers)

    merged = tmp_path / "merged"
    merge_adapter(MergeSettings(adapter=checkpoint, output=merged, dtype="float32"))
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(
        _logits(merged, None, tokens), _logits(base, checkpoint, tokens), rtol=1e-3, atol=1e-3
    )


def _alpaca(path: Path, count: int) -> Path:
    rows = [
        {"instruction": "Tag the text.", "input": QUESTIONS[i % 16], "output": ANSWERS[i % 16]}
        for i in range(count)
    ]
    for number, row in enumerate(rows):
        row["input"] += f" {number}"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.slow
def test_qwen25_tagging_asks_before_training_and_masks_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    data = _alpaca(tmp_path / "tagging.json", 40)
    swapped = {"base": str(base), "data": data, "output": tmp_path / "out", "sample_tokens": 4}
    monkeypatch.setenv("SWANLAB_MODE", "disabled")
    result, lines = _trained(_recipe("qwen2.5-tagging", rows=30, eval_split=6, **swapped))
    assert any("tagging.json is alpaca, 30 rows" in line for line in lines)
    log = read_log(result.path)
    assert len(log.steps) == 4 * 2  # 24 rows in steps of 16
    asked = [sample for sample in log.samples if sample.step == 0]
    assert len(asked) == 5
    assert all(sample.prompt.startswith("Tag the text.\n\nquestion") for sample in asked)
    assert [s.prompt for s in log.samples if s.step == 8] == [s.prompt for s in asked]
    # Each answer and its end token, in every row; nothing else.
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [len(tokenizer(f"{text}<|im_end|>")["input_ids"]) for text in ANSWERS]
    per_row = result.manifest.data["trained_tokens"] / 24
    assert min(ids) <= per_row <= max(ids)


@pytest.mark.slow
def test_qwen25_tagging_sweep(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    file = RECIPES / "qwen2.5-tagging-sweep.yaml"
    given = {"output": tmp_path / "sweep", "answers": False}
    shipped = load_settings(SweepSettings, file, given)
    assert set(shipped.grid) == {"rank", "learning_rate", "rows"}
    assert len(points(shipped)) == 8
    one = _recipe("qwen2.5-tagging").model_dump()
    assert {key: one[key] for key in shipped.recipe} | {"target_modules": list(SEVEN)} == (
        shipped.recipe | {"data": ("tagging.json",)}
    )
    swapped = {
        "base": str(base), "device": "cpu", "data": str(_alpaca(tmp_path / "t.json", 24)),
        "epochs": 1,
    }  # fmt: skip
    settings = shipped.model_copy(
        update={
            "recipe": shipped.recipe | swapped,
            "grid": shipped.grid | {"rows": [8, 24]},
            "heldout": _alpaca(tmp_path / "heldout.json", 6),
        }
    )
    result = sweep(settings, lambda _: None)
    assert not result.failed
    assert best(result) in result.points
    for name, values in result.points.items():
        manifest = read_manifest(settings.output / name)
        assert manifest is not None
        assert manifest.data["rows"] == values["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"quantization": "nf4"},
        {"method": "full", "learning_rate": 1e-3, "tokenization": "eager"},
        {"processes": 2, "deepspeed": "zero3"},
    ],
    ids=["lora", "qlora", "full", "zero3"],
)
def test_qwen2_docs_sft(way: dict[str, Any], tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    rows = [
        {
            "type": "chatml",
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said},
            ],
            "source": "docs",
        }
        for asked, said in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    settings = _recipe(
        "qwen2-docs-sft",
        base=str(base),
        data=_lines(tmp_path / "docs.jsonl", rows[:12]),
        eval_data=_lines(tmp_path / "docs.eval.jsonl", rows[12:]),
        output=tmp_path / "out",
        **way,
    )
    train(settings, lambda _: None)
    log = read_log(settings.output)
    assert log.losses[-1] < log.losses[0]
    assert log.evaluations
    tokens = torch.arange(3, 40)[None]
    if settings.method == "full":
        assert _logits(settings.output, None, tokens).isfinite().all()
    else:
        moved = _logits(base, settings.output, tokens) - _logits(base, None, tokens)
        assert moved.abs().max() > 1e-3


def test_zero3_with_qlora_is_refused(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    data = _lines(tmp_path / "d.jsonl", [{"question": QUESTIONS[0], "answer": ANSWERS[0]}] * 4)
    swapped = {"base": str(base), "data": data, "eval_data": data, "output": tmp_path / "out"}
    more = {"quantization": "nf4", "processes": 2, "deepspeed": "zero3"}
    with pytest.raises(ConfigError, match="packed nf4 weights do not allow; use zero2"):
        train(_recipe("qwen2-docs-sft", **swapped, **more), lambda _: None)
