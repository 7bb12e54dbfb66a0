"""Merging and GPTQ: what a quantized copy costs, and adapters trained on a GPTQ base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.load import load_base
from qlora_serve.base.source import locate_base
from qlora_serve.errors import ConfigError, OutputError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from qlora_serve.settings import load_settings
from tests.gptq_models import write_gptq_model
from tests.tiny_models import write_random_adapter

pytest.importorskip("gptqmodel")

PROBES = [[1, 40, 41, 42, 43], [1, 300, 301]]


@torch.inference_mode()
def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = [[m(torch.tensor([ids])).logits for m in (one, other)] for ids in PROBES]
    return max(float((a - b).abs().max()) for a, b in pairs)


def trained_on(adapter: Path, base: Path, gptq: Path) -> None:
    """Makes an adapter say that it was trained on the GPTQ copy of a base."""
    recorded = ManifestBase(
        name=str(gptq),
        fingerprint=fingerprint(locate_base(str(gptq))),
        quantization="gptq",
        dtype="float32",
        unquantized=str(base),
    )
    write_manifest(adapter, Manifest(base=recorded, probes=PROBES, stop_token_ids=[1]))


def test_quantized_copy_and_cost_of_an_adapter_trained_on_gptq(tiny, tmp_path):
    base = tiny("llama-untied")
    gptq = write_gptq_model(tmp_path / "gptq", base)
    adapter = write_random_adapter(tmp_path / "adapter", base)
    trained_on(adapter, base, gptq)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n")
    settings = {"adapter": adapter, "output": tmp_path / "merged", "quantize": "gptq"}
    settings |= {"gptq_bits": 8, "gptq_group_size": 64, "calibration": rows}
    report = merge_adapter(MergeSettings.model_validate(settings))

    # The oracle: transformers and PEFT on the same directories.
    merged = load_base(str(tmp_path / "merged"), dtype="float32").model
    served = PeftModel.from_pretrained(load_base(str(gptq), dtype="float32").model, adapter).eval()
    copy = load_base(str(tmp_path / "merged-gptq"), dtype="float32")
    cost = report.merged_against_quantized
    assert cost is not None, report.merged_against_quantized_note
    assert cost.max_difference == pytest.approx(largest_difference(served, merged), rel=1e-3)
    found = report.quantized_against_merged
    assert found is not None
    assert found.max_difference == pytest.approx(largest_difference(merged, copy.model), rel=1e-3)
    assert 0 < found.relative_difference < 0.3
    assert copy.source.quantization_settings["bits"] == 8
    assert copy.source.quantization_settings["group_size"] == 64
    assert copy.source.unquantized == report.quantized.removesuffix("-gptq")
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert written == json.loads(report.model_dump_json())

    # It is refused before anything is merged, and a base that went away is said, not guessed.
    again = settings | {"output": tmp_path / "again"}
    (tmp_path / "again-gptq").mkdir()
    (tmp_path / "again-gptq" / "mine").touch()
    with pytest.raises(OutputError, match="again-gptq already holds"):
        merge_adapter(MergeSettings.model_validate(again))
    assert not (tmp_path / "again").exists()
    shutil.rmtree(gptq)
    plain = {"adapter": adapter, "output": tmp_path / "again"}
    note = merge_adapter(MergeSettings.model_validate(plain)).merged_against_quantized_note
    assert "is not here any more" in note


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"quantize": "gptq", "gptq_bits": 5}, "5: expected 2, 3, 4 or 8"),
        ({"quantize": "nf4", "gptq_group_size": 64}, "--gptq-group-size is for --quantize gptq"),
        ({"calibration": Path("rows.jsonl")}, "--calibration is for --quantize gptq"),
    ],
)
def test_settings_that_cannot_be(tiny, tmp_path, flags, words):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"))
    flags |= {"adapter": adapter, "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match=words):
        merge_adapter(load_settings(MergeSettings, None, flags))
    assert not (tmp_path / "out").exists()
