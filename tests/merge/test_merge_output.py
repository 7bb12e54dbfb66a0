"""What a merge leaves on disk, and what it leaves when it is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.source import locate_base
from qlora_serve.errors import OutputError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.report import report_table
from qlora_serve.merge.run import merge_adapter
from tests.tiny_models import write_random_adapter


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter that says it was trained on the base in NF4, with probes and a stop token."""
    base = tiny("llama-untied")
    folder = write_random_adapter(tmp_path / "adapter", base)
    recorded = ManifestBase(
        name=str(base),
        fingerprint=fingerprint(locate_base(str(base))),
        quantization="nf4",
        dtype="float32",
        unquantized=str(base),
    )
    probes = [[1, 40, 41, 42, 43], [1, 300, 301]]
    write_manifest(
        folder,
        Manifest(base=recorded, probes=probes, probes_from="held-out rows", stop_token_ids=[1]),
    )
    return folder


def command(adapter: Path, output: Path, *flags: str) -> list[str]:
    run = "from qlora_serve.cli.main import main; main()"
    return [sys.executable, "-c", run, "merge", str(adapter), "--output", str(output), *flags]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_output_is_an_ordinary_model_directory(tiny, adapter, tmp_path):
    output = tmp_path / "merged"
    settings = MergeSettings(adapter=adapter, output=output, max_shard_size="200KB")
    report = merge_adapter(settings)

    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 220_000 for shard in shards)
    assert not list(output.glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    original = AutoTokenizer.from_pretrained(tiny("llama-untied"))
    assert tokenizer.chat_template == original.chat_template
    # 2 is the base's, 1 is what training relied on.
    assert model.generation_config.eos_token_id == [1, 2]
    assert report.stop_token_ids == [1, 2]
    chat = [{"role": "user", "content": "hello"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    assert oct(output.stat().st_mode)[-3:] == "755"


def test_report_holds_the_proof_and_the_cost(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "merged"
    report = merge_adapter(MergeSettings(adapter=adapter, output=output, dtype="float16"))
    written = json.loads((output / "merge_report.json").read_text())
    assert written == json.loads(report.model_dump_json())
    assert written["probes"] == 2
    assert written["probes_origin"] == "held-out rows of the adapter's own data"
    assert report_table(report).title == f"proof on 2 prompts ({written['probes_origin']})"
    assert written["base_match"] == "same"
    assert len(written["changed_modules"]) == 3 * 7
    assert min(written["changed_modules"].values()) > 0.01
    rounding, effect = report.merged_against_adapter, report.base_against_adapter
    table = report_table(report.model_copy(update={"gguf": {"model-q8_0.gguf": rounding}}))
    assert list(table.columns[0].cells)[-1] == "model-q8_0.gguf, against the merged model"
    assert rounding.relative_difference < 0.05 < effect.relative_difference
    cost = report.merged_against_quantized
    assert cost is not None
    # Quantization moves the answers far more than a cast to float16 does.
    assert cost.mean_kl > rounding.mean_kl


def test_command_prints_json_and_exits_0(adapter, tmp_path):
    flags = ("--json", "--no-compare-quantized")
    call = command(adapter, tmp_path / "merged", *flags)
    result = subprocess.run(call, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["merged_against_quantized_note"] == "not asked for"


@pytest.mark.parametrize("line", ["merging layers", "writing", "asking the written model"])
def test_ctrl_c_leaves_nothing(adapter, tmp_path, line):
    folder = tmp_path / "outputs"
    folder.mkdir()
    call = command(adapter, folder / "merged")
    with subprocess.Popen(
        call, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for printed in process.stderr:
            if printed.startswith(line):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130
    assert "Traceback" not in rest
    assert list(folder.iterdir()) == []


def test_disk_that_takes_no_more_leaves_nothing(adapter, tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    call = command(adapter, folder / "merged")
    # The weights are larger than this, the config is not. Set by a shell, since a function between
    # fork and exec would copy this whole process first.
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 98; exec "$@"', "bash", *map(str, call)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert "Traceback" not in result.stderr
    assert list(folder.iterdir()) == []


def test_too_little_free_space_is_said_before_writing(adapter, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match="free some space"):
        merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "outputs" / "merged"))
    assert list((tmp_path / "outputs").iterdir()) == []


def test_quantized_copy_beside_the_merged_model(adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    from qlora_serve.base.source import locate_base as locate

    settings = {"adapter": adapter, "quantize": "nf4", "compare_quantized": False}
    merge_adapter(MergeSettings.model_validate(settings | {"output": tmp_path / "merged"}))
    copy = locate(str(tmp_path / "merged-nf4"))
    assert copy.quantization == "nf4"
    assert copy.unquantized == str(tmp_path / "merged")
    with pytest.raises(OutputError, match="merged-nf4 already holds"):
        merge_adapter(MergeSettings.model_validate(settings | {"output": tmp_path / "merged"}))


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_adapter_in_shards_merges_as_in_one_file(tiny, adapter, tmp_path, streaming):
    from safetensors.torch import load_file, save_file

    whole = tmp_path / "whole"
    settings = {"adapter": adapter, "streaming": streaming, "compare_quantized": False}
    merge_adapter(MergeSettings.model_validate(settings | {"output": whole}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = adapter / f"adapter_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    (adapter / "adapter_model.safetensors").unlink()
    merge_adapter(MergeSettings.model_validate(settings | {"output": tmp_path / "merged"}))
    got = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert got == (whole / "model.safetensors").read_bytes()
