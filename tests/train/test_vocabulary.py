"""Tokens that training adds: learnt, saved, loaded by PEFT, merged and served."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError, ConfigError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.evaluate.config import EvalSettings
from qlora_serve.train.evaluate.run import evaluate
from qlora_serve.train.log import read_log
from qlora_serve.train.run import train
from qlora_serve.train.vocabulary import add_tokens
from tests.mixed_batch import load_residents, mixed_rows
from tests.tiny_models import write_tiny_model
from tests.train.chats import chat, command, quiet_environment, write_chats

NEW = ("[tag]", "[/tag]")
CHATS = [chat(f"question {i % 5}", f"[tag]world {i % 3}[/tag]") for i in range(16)]


def _settings(base: Path, folder: Path, **settings: Any) -> TrainSettings:
    chosen = {
        "learning_rate": 1e-2, "rank": 4, "alpha": 8, "device": "cpu", "max_steps": 6,
        "add_tokens": NEW, "data": write_chats(folder / "chats.jsonl", CHATS),
        "output": folder / "out",
    }  # fmt: skip
    return TrainSettings(base=str(base), **(chosen | settings))


def _train(base: Path, folder: Path, **settings: Any) -> Path:
    return train(_settings(base, folder, **settings), lambda _: None).path


def _tight(base: Path) -> Path:
    """A base without unused rows, whose embeddings have to grow."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(base)))
    model.save_pretrained(base)
    return base


@torch.no_grad()
def _alone(base: Path, adapter: Path, tokens: list[int]) -> torch.Tensor:
    """By PEFT, on a base that is resized as PEFT's users do it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(
        max(len(AutoTokenizer.from_pretrained(adapter)), model.config.vocab_size)
    )
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    logits: torch.Tensor = adapted(input_ids=torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama-untied", {}),
        ("llama-untied", {"padded": True}),
        pytest.param("llama", {"padded": True}, marks=pytest.mark.slow),
        pytest.param(
            "llama-untied", {"modules_to_save": ["embed_tokens", "lm_head"]}, marks=pytest.mark.slow
        ),
        pytest.param("gemma2", {}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"quantization": "nf4"}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"bias": "all"}, marks=pytest.mark.slow),
    ],
)
def test_new_tokens_are_learnt_served_and_merged(
    family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    base, more = write_tiny_model(tmp_path / "base", family), dict(more)
    is_padded = more.pop("padded", False)
    if not is_padded:
        _tight(base)
    adapter = _train(base, tmp_path, **more)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    first = len(AutoTokenizer.from_pretrained(base))
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [first, first + 1]
    tokens = [1, *tokenizer("[tag]world 1[/tag] question")["input_ids"]]
    assert {first, first + 1} <= set(tokens)
    log = read_log(adapter)
    assert log.losses[-1] < log.losses[0]
    # The new rows are no longer what they began as, on both sides of the model.
    begun = load_base(str(base), dtype="float32", device="cpu")
    add_tokens(begun, NEW)
    start = begun.model.get_input_embeddings().weight[first : first + 2].detach()
    saved = load_file(adapter / "adapter_model.safetensors")
    rows = [t for n, t in saved.items() if n.endswith(("trainable_tokens_delta", "tokens.weight"))]
    assert rows
    assert all(not torch.allclose(row[-2:].float(), start, atol=1e-4) for row in rows)
    if more.get("quantization"):
        return
    if family == "llama-untied" and not more:
        with pytest.raises(AdapterError, match="tokens or a chat template of its own"):
            evaluate(
                EvalSettings(
                    base=str(base), adapter={"tags": adapter}, data=tmp_path / "chats.jsonl"
                ),
                lambda _: None,
            )
    expected = _alone(base, adapter, tokens)
    size = 512 if is_padded else first + 2
    assert expected.shape[1] == size

    merged = tmp_path / "merged"
    merge_adapter(MergeSettings(adapter=adapter, output=merged, dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()

    from qlora_serve.serve.engine.runner import Runner

    runner = Runner(load_base(str(base), dtype="float32"))
    residents = load_residents(runner, {"tags": adapter})
    one = mixed_rows(runner, residents, {"base": 9, "tags": 12}, prompts={"tags": tokens[:5]})
    alone = _alone(base, adapter, one["tags"].tokens)[one["tags"].first :]
    torch.testing.assert_close(one["tags"].logits[:, :size], alone, atol=1e-4, rtol=1e-4)


def test_a_new_token_begins_as_what_it_was_made_of(tmp_path: Path) -> None:
    base = load_base(str(write_tiny_model(tmp_path / "base", "llama")), device="cpu")
    pieces = base.tokenizer("[tag]")["input_ids"]
    weight = base.model.get_input_embeddings().weight
    expected = weight[pieces].mean(0)
    add_tokens(base, NEW)
    row = base.model.get_output_embeddings().weight[base.tokenizer.convert_tokens_to_ids("[tag]")]
    torch.testing.assert_close(row, expected)
    with pytest.raises(ConfigError, match=r"'\[tag\]' are tokens of .* already"):
        add_tokens(base, ["[tag]"])


@pytest.mark.slow
def test_a_run_with_new_tokens_is_resumed_exactly(tmp_path: Path) -> None:
    base = _tight(write_tiny_model(tmp_path / "base", "llama"))
    whole = _train(base, tmp_path, output=tmp_path / "whole")
    cut = _settings(base, tmp_path, save_every=3)
    train(cut, lambda _: None)
    (tmp_path / "out").rename(tmp_path / "first")
    last = tmp_path / "out.checkpoints" / "checkpoint-6"
    last.rename(tmp_path / "last")
    assert (tmp_path / "out.checkpoints" / "checkpoint-3" / "tokenizer.json").is_file()
    again = _train(base, tmp_path, save_every=3, resume=True)
    assert read_log(again).losses == pytest.approx(read_log(whole).losses, abs=1e-6)


@pytest.mark.slow
def test_full_fine_tuning_with_new_tokens(tmp_path: Path) -> None:
    base = _tight(write_tiny_model(tmp_path / "base", "llama"))
    model = _train(base, tmp_path, method="full", learning_rate=1e-3)
    rows = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    assert len(rows) == len(AutoTokenizer.from_pretrained(model))


@pytest.mark.slow
def test_two_processes_with_zero2_learn_new_tokens(tmp_path: Path) -> None:
    base = _tight(write_tiny_model(tmp_path / "base", "llama-untied"))
    settings = _settings(base, tmp_path, processes=2, deepspeed="zero2", micro_batch=2)
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    done = subprocess.run(
        command("train", "--config", file),
        capture_output=True, text=True, check=False, env=quiet_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = _train(base, tmp_path, output=tmp_path / "alone")
    tokens = [1, 50, 300, 12]
    torch.testing.assert_close(
        _alone(base, settings.output, tokens), _alone(base, alone, tokens), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"add_tokens": ["<|im_end|>"]}, "already; --trainable-tokens trains their rows"),
        ({"add_tokens": ["[a]", "[a]"]}, "each once"),
        ({"modules_to_save": ["lm_head"]}, "name all of embed_tokens, lm_head"),
        ({"deepspeed": "zero3"}, "cannot grow then; use zero2"),
    ],
)
def test_what_cannot_be_added(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    with pytest.raises(ConfigError, match=reason):
        _train(base, tmp_path, **settings)
    assert not (tmp_path / "out").exists()
