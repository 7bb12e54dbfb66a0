"""Mistakes of training scripts that people copy, each of which would fail here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_serve.train import trainer as trainer_module
from qlora_serve.train.announce import dtype_hint
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.run import train
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, write_chats


def _train(base: Path, folder: Path, **settings: Any) -> tuple[Path, list[str]]:
    chosen = {
        "learning_rate": 1e-2, "rank": 4, "alpha": 8, "device": "cpu", "max_steps": 3,
        "data": write_chats(folder / "chats.jsonl", SOME_CHATS), "output": folder / "out",
    }  # fmt: skip
    lines: list[str] = []
    return train(TrainSettings(base=str(base), **(chosen | settings)), lines.append).path, lines


@pytest.mark.parametrize(
    ("family", "dtype", "bias"),
    [
        ("qwen2", "float32", "lora_only"),
        pytest.param("qwen2", "bfloat16", "lora_only", marks=pytest.mark.slow),
        ("phi", "bfloat16", "all"),  # with biases of norms and of the output head
    ],
)
def test_each_bias_is_saved_under_its_own_name(
    family: str, dtype: str, bias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, torch.Tensor] = {}
    tensors_of = trainer_module.OurTrainer.published_tensors

    def remember(self: Any) -> Any:
        named = self.model.named_parameters()
        trained.update({name: p.detach().clone() for name, p in named if p.requires_grad})
        return tensors_of(self)

    monkeypatch.setattr(trainer_module.OurTrainer, "published_tensors", remember)
    base = write_tiny_model(tmp_path / "base", family)
    adapter, _ = _train(base, tmp_path, bias=bias, dtype=dtype)
    own = {name: tensor for name, tensor in trained.items() if name.endswith("bias")}
    layers = 3
    assert len(own) == (3 * layers if bias == "lora_only" else len(own))
    assert len(own) >= 3 * layers
    assert all(tensor.dtype == torch.float32 for tensor in own.values())
    saved = load_file(adapter / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name, tensor in own.items():
        assert torch.equal(saved[name], tensor), name
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if not plain.endswith("k_proj.bias"):  # softmax does not feel a key's bias
            assert not torch.equal(tensor, stored[plain]), name
    assert len({tensor.sum().item() for tensor in own.values()}) == len(own)  # none is another's


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_row_of_an_end_token_that_is_also_padding_learns(dtype: str, tmp_path: Path) -> None:
    """torch gives the padding row of an embedding no gradient."""
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.pad_token_id == model.config.eos_token_id == 2
    assert model.get_input_embeddings().padding_idx == 2
    adapter, _ = _train(base, tmp_path, trainable_tokens=["<|im_end|>"], dtype=dtype)
    saved = load_file(adapter / "adapter_model.safetensors")
    rows = {n: t for n, t in saved.items() if n.endswith("trainable_tokens_delta")}
    assert len(rows) == 2  # what is read, and what is said
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for row in rows.values():
        assert all(not torch.equal(row[0].float(), weight[2]) for weight in weights)


@pytest.mark.slow
def test_full_fine_tuning_teaches_the_padding_row_too(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    trained, _ = _train(base, tmp_path, method="full", learning_rate=1e-3)
    name = "model.embed_tokens.weight"
    rows = [load_file(folder / "model.safetensors")[name][2] for folder in (base, trained)]
    assert not torch.equal(*rows)


@pytest.mark.parametrize("name", ["some-chat", "some-base"])
def test_what_a_model_is_called_says_nothing(name: str, tmp_path: Path) -> None:
    """Whether the vocabulary must be trained is seen from it, not from the path."""
    base = write_tiny_model(tmp_path / name, "llama")
    _, lines = _train(base, tmp_path, max_steps=1)
    assert any("has never learnt <|im_end|>" in line for line in lines)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = torch.randn(64) * 0.1
    model.save_pretrained(base)
    _, lines = _train(base, tmp_path, max_steps=1, output=tmp_path / "again")
    assert not any("has never learnt" in line for line in lines)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_a_module_that_is_trained_whole_fits_a_base_of_16_bits(module: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama-untied")
    settings = {"modules_to_save": [module], "dtype": "bfloat16", "sample_prompt": ["hello"]}
    adapter, _ = _train(base, tmp_path, sample_tokens=2, **settings)
    saved = load_file(adapter / "adapter_model.safetensors")
    weights = [tensor for name, tensor in saved.items() if "lora" not in name]
    assert weights
    assert all(weight.dtype == torch.float32 for weight in weights)  # small steps are not lost
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        assert adapted(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_float16_where_bfloat16_would_do_is_hinted_at() -> None:
    hint = dtype_hint("float16", gpu_has_bfloat16=True)
    assert hint is not None
    assert "--dtype bfloat16" in hint
    assert dtype_hint("float16", gpu_has_bfloat16=False) is None
    assert dtype_hint("bfloat16", gpu_has_bfloat16=True) is None
