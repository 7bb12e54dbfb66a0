"""What `merge` refuses, each in one line and with nothing published."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.prepare import prepare_base
from qlora_serve.base.source import locate_base
from qlora_serve.cli.merge import merge as merge_command
from qlora_serve.errors import AdapterError, ConfigError, MergeError, OutputError, QloraServeError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.export import cast_weights
from qlora_serve.merge.proof import Comparison, find_fault
from qlora_serve.merge.run import merge_adapter
from qlora_serve.merge.sources import choose_base
from qlora_serve.settings import load_settings
from tests.tiny_models import write_random_adapter, write_tiny_model


@pytest.fixture
def adapter(tiny, tmp_path):
    return write_random_adapter(tmp_path / "adapter", tiny("llama"))


def add_manifest(adapter: Path, base: Path, **changes: object) -> None:
    """Writes the manifest that training on `base` would leave."""
    recorded = {
        "name": str(base),
        "fingerprint": fingerprint(locate_base(str(base))),
        "quantization": locate_base(str(base)).quantization,
        "dtype": "float32",
        "unquantized": None,
    }
    write_manifest(adapter, Manifest(base=ManifestBase.model_validate(recorded | changes)))


def change_base(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def cast_copy(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder)
    return folder


def refuse(kind: type[QloraServeError], words: str, **settings: object) -> None:
    """Checks that a merge is refused in one line that holds `words`, and leaves nothing."""
    output = Path(str(settings["output"]))
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        merge_adapter(MergeSettings.model_validate(settings))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert sorted(output.parent.iterdir()) == before


def test_quantized_base_is_refused_with_the_way_out(tiny, adapter, tmp_path):
    prepare_base(str(tiny("llama")), tmp_path / "nf4", "nf4", lambda line: None)
    settings = {"adapter": adapter, "output": tmp_path / "out"}
    refuse(MergeError, "is quantized (nf4)", **settings, base=str(tmp_path / "nf4"))
    refuse(MergeError, str(tiny("llama")), **settings, base=str(tmp_path / "nf4"))


@pytest.mark.parametrize("named", ["--base", "the adapter's"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 128}),
        ("fp8", {"quant_method": "fp8"}),
    ],
)
def test_every_kind_of_quantized_base_is_refused_by_name(
    tiny, adapter, tmp_path, kind, settings, named
):
    base = shutil.copytree(tiny("llama"), tmp_path / "quantized")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    given = {"base": str(base)} if named == "--base" else {}
    if not given:
        change_base(adapter, base)
    refuse(MergeError, kind, adapter=adapter, output=tmp_path / "out", **given)


def test_adapter_of_a_quantized_copy_finds_the_original(tiny, adapter, tmp_path):
    copy = prepare_base(str(tiny("llama")), tmp_path / "nf4", "nf4", lambda line: None)
    add_manifest(adapter, copy, unquantized=None)
    chosen = choose_base(read_adapter(adapter), None, allow_mismatch=False)
    assert chosen.source.path == tiny("llama")
    assert chosen.match == "same"


def test_quantized_copy_without_record_needs_base(tiny, adapter, tmp_path):
    copy = prepare_base(str(tiny("llama")), tmp_path / "nf4", "nf4", lambda line: None)
    (copy / "qlora_serve_base.json").unlink()
    add_manifest(adapter, copy)
    refuse(MergeError, "pass --base", adapter=adapter, output=tmp_path / "out")
    chosen = choose_base(read_adapter(adapter), str(tiny("llama")), allow_mismatch=False)
    assert chosen.match == "unknown"


def test_cast_of_the_base_is_accepted_and_other_weights_are_not(tiny, adapter, tmp_path):
    add_manifest(adapter, tiny("llama"))
    half = cast_copy(tiny("llama"), tmp_path / "half", torch.float16)
    chosen = choose_base(read_adapter(adapter), str(half), allow_mismatch=False)
    assert chosen.match == "same values"
    other = write_tiny_model(tmp_path / "other", "llama", seed=9)
    refuse(
        MergeError,
        "--allow-base-mismatch",
        adapter=adapter,
        output=tmp_path / "out",
        base=str(other),
    )
    chosen = choose_base(read_adapter(adapter), str(other), allow_mismatch=True)
    assert chosen.match == "different"


def test_base_that_went_away(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refuse(MergeError, "pass --base", adapter=adapter, output=tmp_path / "out")
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refuse(MergeError, "does not say which base", adapter=adapter, output=tmp_path / "out")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_adapter_that_changes_nothing_is_refused(tiny, tmp_path, settings):
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    # PEFT starts with B = 0: this is an adapter before its first training step.
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    get_peft_model(model, config).save_pretrained(adapter)
    refuse(MergeError, "changes nothing", adapter=adapter, output=tmp_path / "out")


def test_output_that_holds_something(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refuse(OutputError, "already holds", adapter=adapter, output=tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_adapter_for_another_shape(tiny, adapter, tmp_path):
    base = str(tiny("phi"))
    refuse(AdapterError, "does not fit", adapter=adapter, output=tmp_path / "out", base=base)


def test_start_that_changed_the_base(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["init_lora_weights"] = "pissa"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refuse(MergeError, "plain LoRA", adapter=adapter, output=tmp_path / "out")


def test_beyond_tolerance_nothing_is_published(adapter, tmp_path):
    refuse(
        MergeError,
        "more than the tolerance",
        adapter=adapter,
        output=tmp_path / "out",
        dtype="bfloat16",
        tolerance=1e-6,
    )


def comparison(difference: float, kl: float) -> Comparison:
    return Comparison(
        max_difference=difference,
        relative_difference=difference,
        mean_kl=kl,
        top1_agreement=1.0,
        equal_answers=4,
        answers=4,
    )


@pytest.mark.parametrize(
    ("merged", "base", "words"),
    [
        (comparison(0.2, 0.01), comparison(3.0, 1.0), "tolerance"),
        (comparison(float("nan"), 0.01), comparison(3.0, 1.0), "tolerance"),
        (comparison(0.01, 0.02), comparison(0.01, 0.01), "more .* than the adapter itself"),
        (comparison(0.01, float("nan")), comparison(0.01, 0.01), "more .* than the adapter itself"),
    ],
)
def test_fault_is_found(merged, base, words):
    fault = find_fault(merged, base, tolerance=0.1, dtype="float16")
    assert fault is not None
    assert re.search(words, fault)


def test_no_fault_within_the_tolerance():
    merged, base = comparison(0.1, 0.001), comparison(0.05, 0.01)
    assert find_fault(merged, base, tolerance=0.1, dtype="float16") is None


def test_force_publishes_and_says_so(adapter, tmp_path, capfd):
    settings = MergeSettings(
        adapter=adapter, output=tmp_path / "out", dtype="bfloat16", tolerance=1e-6, force=True
    )
    merge_command(settings)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    said = capfd.readouterr().err
    assert f"published by --force without passing its proof: {written['fault']}" in said
    assert "more than the tolerance" in written["fault"]


def test_weights_too_large_for_float16_are_refused(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(MergeError, match="do not fit into float16"):
        cast_weights(model, "float16")
    cast_weights(model, "bfloat16")


@pytest.mark.parametrize("size", ["2", "GB", "-1GB", "2.5GB", "0GB"])
def test_shard_size_that_is_none(size):
    flags = {"adapter": "a", "output": "b", "max_shard_size": size}
    with pytest.raises(ConfigError, match="like 2GB"):
        load_settings(MergeSettings, None, flags)
