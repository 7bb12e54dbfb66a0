"""A streamed merge equals the merge in memory, byte by byte, and never appears half."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.adapters.files import read_adapter
from qlora_serve.base.source import locate_base
from qlora_serve.errors import ConfigError, MergeError
from qlora_serve.merge import recipes, tensor_files
from qlora_serve.merge.bake import attach_adapter
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from qlora_serve.merge.stream import merge_streamed, why_not_streamable
from qlora_serve.settings import load_settings
from tests.merge.test_merge_logits import KINDS
from tests.tiny_models import write_random_adapter, write_tiny_model

MORE_KINDS = KINDS | {
    "dora-embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "lora-bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "head-lora": {"target_modules": ["lm_head", "q_proj"]},
}
CASES = [
    ("llama", "lora"),
    ("llama", "dora"),
    ("llama", "rslora"),
    ("llama", "patterns"),
    ("llama", "embedding"),
    ("llama", "head"),
    ("llama", "new-embedding"),
    ("llama", "tied-embedding"),
    ("llama", "tokens"),
    ("llama", "head-lora"),
    ("llama-untied", "dora-embedding"),
    ("qwen2", "bias"),
    ("qwen2", "lora-bias"),
    ("qwen3", "lora"),
    ("gemma", "lora"),
    ("phi3", "lora"),
]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bfloat16_copy(base: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # So that matrices of a tiny model fall into several blocks, the last of them shorter.
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 4 * 64 * 23)


def in_memory(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The merge by PEFT alone, in float32 and cast once; untied where the adapter needs it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    was_tied = model.config.tie_word_embeddings
    merged = attach_adapter(model, read_adapter(adapter)).merge_and_unload().state_dict()
    head, embedding = merged["lm_head.weight"], merged["model.embed_tokens.weight"]
    if was_tied and head.equal(embedding):
        del merged["lm_head.weight"]
    return {name: tensor.to(dtype) for name, tensor in merged.items()}


def stream(folder: Path, base: Path, adapter: Path, dtype: str, shard: str = "150KB") -> Any:
    folder.mkdir()
    arguments = (folder, locate_base(str(base)), read_adapter(adapter), dtype, shard, None)
    return merge_streamed(*arguments, lambda done: None)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_streamed_tensors_are_peft_s_to_the_last_bit(tiny, tmp_path, family, kind):
    base = bfloat16_copy(tiny(family), tmp_path / "base")
    adapter = write_random_adapter(tmp_path / "adapter", base, **MORE_KINDS[kind])
    expected = in_memory(base, adapter, torch.bfloat16)
    streamed = stream(tmp_path / "out", base, adapter, "bfloat16")
    got = tensors_of(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.equal(expected[name]), name
    assert streamed.is_untied == (family == "llama" and "lm_head.weight" in expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "lora"), ("llama", "tokens"), ("qwen2", "bias")]
)
def test_streamed_model_is_the_one_merged_in_memory(tiny, tmp_path, family, kind):
    base = bfloat16_copy(tiny(family), tmp_path / "base")
    adapter = write_random_adapter(tmp_path / "adapter", base, **MORE_KINDS[kind])
    reports = {}
    for mode in ("off", "on"):
        settings = {"adapter": adapter, "output": tmp_path / mode, "streaming": mode}
        reports[mode] = merge_adapter(MergeSettings.model_validate(settings))
    expected, got = tensors_of(tmp_path / "off"), tensors_of(tmp_path / "on")
    assert all(tensor.equal(expected[name]) for name, tensor in got.items())
    assert got.keys() == expected.keys()
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        contents = [json.loads((tmp_path / mode / file).read_text()) for mode in ("off", "on")]
        for content in contents:
            content.pop("_name_or_path", None)
        assert contents[0] == contents[1]
    assert reports["on"].streamed
    assert reports["on"].untied_embeddings == reports["off"].untied_embeddings
    assert reports["on"].changed_modules == pytest.approx(
        reports["off"].changed_modules, rel=1e-3, abs=1e-9
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(tiny, tmp_path, dtype):
    base = tiny("llama-untied")
    adapter = write_random_adapter(tmp_path / "adapter", base)
    stream(tmp_path / "out", base, adapter, dtype)
    expected = in_memory(base, adapter, getattr(torch, dtype))
    got = tensors_of(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in got.items())


def test_large_bases_are_streamed_by_default(tiny, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"))
    settings = {"adapter": adapter, "streaming_above": "100KB"}
    report = merge_adapter(MergeSettings.model_validate(settings | {"output": tmp_path / "a"}))
    assert report.streamed
    half = settings | {"output": tmp_path / "b", "proof_dtype": "bfloat16"}
    assert merge_adapter(MergeSettings.model_validate(half)).proof_dtype == "bfloat16"
    report = merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "c"))
    assert not report.streamed


def test_proof_dtype_needs_streaming():
    flags = {"adapter": "a", "output": "b", "streaming": "off", "proof_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="streamed merges"):
        load_settings(MergeSettings, None, flags)


def test_no_op_adapter_is_refused_and_nothing_stays(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "outputs"
    settings = MergeSettings(
        adapter=tmp_path / "adapter", output=out / "m", base=str(tiny("llama")), streaming="on"
    )
    with pytest.raises(MergeError, match="changes nothing"):
        merge_adapter(settings)
    assert list(out.iterdir()) == []


def test_files_that_are_not_the_model_s_parameters(tiny, tmp_path):
    from safetensors.torch import save_file

    base = write_tiny_model(tmp_path / "base", "llama-untied")
    assert why_not_streamable(locate_base(str(base))) is None
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["fused.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "hold no tensor" in str(why_not_streamable(locate_base(str(base))))
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama-untied"))
    settings = MergeSettings(
        adapter=adapter, output=tmp_path / "out", base=str(base), streaming="on"
    )
    with pytest.raises(MergeError, match="tensor by tensor"):
        merge_adapter(settings)


def test_no_more_than_a_block_is_read_at_once(tiny, tmp_path, monkeypatch):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama-untied"))
    fill, sizes = tensor_files._fill, []

    def counted(descriptor: int, view: memoryview, *where: Any) -> None:
        sizes.append(len(view))
        fill(descriptor, view, *where)

    monkeypatch.setattr(tensor_files, "_fill", counted)
    stream(tmp_path / "out", tiny("llama-untied"), adapter, "float32")
    assert 0 < max(sizes) <= 4 * 64 * 23 < 128 * 64 * 4


def test_blocks_are_the_tensor(tmp_path):
    base = write_tiny_model(tmp_path / "base", "qwen2")
    whole = load_file(base / "model.safetensors")
    for name, stored in tensor_files.stored_tensors(locate_base(str(base))).items():
        parts = [(first, part.clone()) for first, part in stored.rows(least=2)]
        assert torch.cat([part.reshape(-1) for _, part in parts]).equal(whole[name].reshape(-1))
        assert all(len(part) >= 2 for _, part in parts)
        assert stored.whole().equal(whole[name])
        assert [first for first, _ in parts] == sorted({first for first, _ in parts})


def test_merge_streamed_reports_values_that_do_not_fit(tmp_path, tiny):
    from safetensors.torch import save_file

    base = write_tiny_model(tmp_path / "base", "llama-untied")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = write_random_adapter(tmp_path / "adapter", base)
    with pytest.raises(MergeError, match=r"model.norm.weight has values that do not fit"):
        stream(tmp_path / "out", base, adapter, "float16")


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 200, 300])
def test_products_are_torch_s_to_the_last_bit(rank):
    torch.manual_seed(rank)
    for rows, width in ((2, 64), (23, 576), (256, 2048), (341, 1536)):
        b, a = torch.randn(rows + 1, rank)[1:], torch.randn(rank, width)
        assert recipes._product(b, a).equal(b @ a), (rows, width)
