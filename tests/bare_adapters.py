"""Adapter directories of a few hundred bytes, for tests that need no base model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "some-base",
}
STEM = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def bare_tensors(seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """LoRA tensors of rank 2 for a few layers of width 4."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        tensors[STEM.format(layer, "A")] = torch.randn(2, 4, generator=generator)
        tensors[STEM.format(layer, "B")] = torch.randn(4, 2, generator=generator)
    return tensors


def write_bare_adapter(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Writes an adapter with random weights; `config` sets keys of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(bare_tensors(seed), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
