"""Tiny GPTQ checkpoints, by gptqmodel and in AutoGPTQ's own format."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_serve.base.gptq import import_gptqmodel, settle_layers
from qlora_serve.base.load import load_base
from qlora_serve.base.quantize_gptq import (
    CALIBRATION_FILE,
    GptqSettings,
    calibration_rows,
    quantize_model,
    save_model,
)


def write_gptq_model(folder: Path, base: Path, **settings: Any) -> Path:
    """Quantizes a base with gptqmodel and returns the new one's directory.

    Args:
        folder: where to write it.
        base: an unquantized tiny model.
        settings: of `GptqSettings`; groups of 32 by default.
    """
    loaded = load_base(str(base), dtype="float32", device="cpu")
    rows = calibration_rows(CALIBRATION_FILE, loaded.tokenizer, longest=512)[:2]
    chosen = GptqSettings(**({"group_size": 32} | settings))
    save_model(quantize_model(loaded.model, chosen, rows), folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def unpack(packed: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    """The codes in words of 32 bits, the first in the lowest bits, along a dimension."""
    codes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(codes, along + 1).flatten(along, along + 1)


def layers_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Layer → its codes [in, out], zeros [groups, out] as they are meant, scales and g_idx."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = settings["bits"]
    layers = {}
    for name in sorted(tensors):
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix("qweight")
        packed = tensors[stem + "qzeros"]
        if settings["checkpoint_format"] == "gptq":
            packed = packed + sum(1 << shift for shift in range(0, 32, bits))
        layers[stem.removesuffix(".")] = {
            "codes": unpack(tensors[name], bits, 0),
            "zeros": unpack(packed, bits, 1),
            "scales": tensors[stem + "scales"],
            "g_idx": tensors[stem + "g_idx"],
        }
    return layers


def write_autogptq_model(folder: Path, gptq: Path, in_config: bool) -> Path:
    """The same numbers as AutoGPTQ stored them: zero points less one, code by code.

    Args:
        folder: where to write it.
        gptq: a checkpoint of `write_gptq_model` with 4 or 8 bits.
        in_config: as its later versions did, with the settings in config.json and the usual file
            name; else as the earlier ones.
    """
    shutil.copytree(gptq, folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    kept = {name: settings[name] for name in ("bits", "group_size", "desc_act", "sym")}
    kept |= {"damp_percent": 0.01, "true_sequential": True, "model_name_or_path": None}
    tensors = load_file(folder / "model.safetensors")
    for stem, layer in layers_of(gptq).items():
        tensors[f"{stem}.qzeros"] = _pack(layer["zeros"] - 1, settings["bits"])
    (folder / "model.safetensors").unlink()
    name = "model" if in_config else f"gptq_model-{kept['bits']}bit-{kept['group_size']}g"
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if in_config:
        config["quantization_config"] = kept | {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(kept))
    return folder


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[groups, out] → int32 [groups, out * bits / 32]; a code of -1 becomes the largest."""
    groups, out = codes.shape
    a_word = 32 // bits
    parts = (codes.long() & (2**bits - 1)).view(groups, out // a_word, a_word)
    words = sum(parts[:, :, number] << (bits * number) for number in range(a_word))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_dequantized(folder: Path, gptq: Path, base: Path) -> Path:
    """An ordinary float32 model with a checkpoint's weights: scale * (code - zero), exactly."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    stored = load_file(gptq / "model.safetensors")
    for stem, layer in layers_of(gptq).items():
        group = layer["g_idx"].long()
        codes = layer["codes"][: len(group)] - layer["zeros"][group]
        weight = layer["scales"].double()[group] * codes
        tensors[f"{stem}.weight"] = weight.float().t().contiguous()
        if f"{stem}.bias" in tensors:
            tensors[f"{stem}.bias"] = stored[f"{stem}.bias"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_gptq_linear(
    inside: int, outside: int, bits: int, group_size: int, by_activity: bool, seed: int = 0
) -> Any:
    """A layer of gptqmodel's with random codes, as `load_base` leaves it."""
    import_gptqmodel()
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    torch.manual_seed(seed)
    linear = TorchLinear(bits, group_size, False, by_activity, inside, outside, bias=True)
    linear.qweight.random_(-(2**31), 2**31 - 1)
    linear.qzeros.random_(-(2**31), 2**31 - 1)
    linear.scales.uniform_(0.01, 0.1)
    linear.bias = torch.randn(outside)
    if by_activity:
        linear.g_idx.copy_(linear.g_idx[torch.randperm(inside)])
    linear.post_init()
    settle_layers(torch.nn.Sequential(linear))
    return linear.eval()
