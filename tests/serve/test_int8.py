"""int8 layers with large inputs: each row is what bitsandbytes gives for that row alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_rows import row_by_row
from mixed_batch import check_against_peft, load_residents, mixed_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import write_random_adapter, write_tiny_model
from torch import Tensor, nn

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.int8 import use_rows_of_int8
from qlora_serve.serve.engine.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def _layer(how: Any) -> nn.Sequential:
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(128, 97, bias=True, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(97, 128) * 0.1, "bias": torch.randn(97)})
    model = nn.Sequential(layer.to("cpu")).eval()  # quantizes
    how(model)
    return model


def _rows() -> Tensor:
    """Some rows with large inputs, in columns of their own and in shared ones; one of zeros."""
    torch.manual_seed(1)
    hidden = torch.randn(1, 12, 128)
    for row, column, value in ((0, 5, 40.0), (0, 9, -7.0), (3, 5, 6.0), (7, 100, 300.0)):
        hidden[0, row, column] = value
    hidden[0, 11] = 0
    return hidden


@torch.inference_mode()
def test_a_layer_computes_each_row_as_bitsandbytes_does_for_it_alone() -> None:
    hidden = _rows()
    ours, alone = _layer(use_rows_of_int8), _layer(row_by_row)
    expected = alone(hidden)
    assert (ours(hidden) - expected).abs().max() < 1e-5 * expected.abs().max()
    each = [ours(hidden[:, row : row + 1]) for row in range(12)]
    assert ours(hidden).equal(torch.cat(each, dim=1))
    # What this is for: over several rows at once bitsandbytes gives something else.
    together = _layer(lambda model: None)(hidden)
    assert (together - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_nan_stays_in_its_row() -> None:
    hidden = _rows()
    layer = _layer(use_rows_of_int8)
    clean = layer(hidden)
    hidden[0, 3, 5] = float("nan")
    found = layer(hidden)
    assert found[0, 3].isnan().all()
    assert found[0, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]].equal(clean[0, [0, 1, 2, *range(4, 12)]])


def _with_large_inputs(base: Path) -> Path:
    """Three features of every hidden state 30 times as large, as large models have them."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 17, 40]] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    return base


@torch.inference_mode()
def test_a_mixed_batch_with_large_inputs_matches_peft(tmp_path: Path) -> None:
    base = _with_large_inputs(write_tiny_model(tmp_path / "base", "llama"))
    paths = {
        "lora": write_random_adapter(tmp_path / "lora", base, seed=1),
        "dora": write_random_adapter(tmp_path / "dora", base, seed=2, use_dora=True),
    }

    def peft(folder: Path, adapter: Path | None) -> Any:
        model = load_base(str(folder), quantization="int8", dtype="float32").model
        row_by_row(model)
        return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()

    runner = Runner(load_base(str(base), quantization="int8", dtype="float32"))
    residents = load_residents(runner, paths)
    found = mixed_rows(runner, residents, {"base": 31, "lora": 9, "dora": 20})
    check_against_peft(base, paths, found, 0.15, 0.5, peft)
    if shutil.which("g++") is not None:
        for name, length in {"lora": 9, "dora": 20}.items():
            prompt = found[name].tokens[:length]
            alone = mixed_rows(runner, residents, {name: 0}, prompts={name: prompt})
            assert alone[name].logits.equal(found[name].logits)
