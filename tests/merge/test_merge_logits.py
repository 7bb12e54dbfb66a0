"""The merged model answers as PEFT does, for each kind of adapter on each family."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from tests.tiny_models import write_random_adapter

FAMILIES = ["llama", "llama-untied", "qwen2", "qwen3", "mistral", "gemma", "phi"]
TIED = ["llama", "gemma"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "layers_to_transform": [0, 2],
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"bias": "all"},
    "new-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tied-embedding": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 300]},
}
CASES = [(family, kind) for family in FAMILIES for kind in ("lora", "dora")] + [
    ("llama", "rslora"),
    ("llama", "patterns"),
    ("qwen2", "bias"),
    ("phi", "bias"),
    ("llama", "embedding"),
    ("llama-untied", "embedding"),
    ("gemma", "embedding"),
    ("llama", "head"),
    ("llama-untied", "head"),
    ("gemma", "head"),
    ("llama", "new-embedding"),
    ("llama", "tied-embedding"),
    ("llama", "tokens"),
]
# Trained tokens and `ensure_weight_tying` change both matrices alike, so they are tied again.
TOUCHES_EMBEDDINGS = {"embedding", "head", "new-embedding"}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_float32_merge_equals_peft(tiny, tmp_path, family, kind):
    base = tiny(family)
    adapter = write_random_adapter(tmp_path / "adapter", base, **KINDS[kind])
    output = tmp_path / "merged"

    report = merge_adapter(MergeSettings(adapter=adapter, output=output, dtype="float32"))

    tokens = torch.tensor([[1, 50, 60, 5, 300, 2, 9, 511]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(tokens).logits
        expected = PeftModel.from_pretrained(model, adapter).eval()(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        got = merged(tokens).logits
    assert (expected - plain).abs().max() > 0.01, "the adapter must do something"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert report.untied_embeddings == (family in TIED and kind in TOUCHES_EMBEDDINGS)
    config = json.loads((output / "config.json").read_text())
    if family in TIED:
        assert config["tie_word_embeddings"] != report.untied_embeddings


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_the_float32_merge_cast_once(tiny, tmp_path, dtype):
    base = tiny("llama-untied")
    adapter = write_random_adapter(tmp_path / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()

    report = merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "out", dtype=dtype))

    wanted = getattr(torch, dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == wanted
    for name, tensor in merged.state_dict().items():
        assert tensor.equal(expected[name].to(wanted)), name
    assert 0 < report.merged_against_adapter.relative_difference < report.tolerance


def test_dtype_defaults_to_the_stored_one_of_the_base(tiny, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(base)
    adapter = write_random_adapter(tmp_path / "adapter", base)
    report = merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "out"))
    assert report.dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype is (
        torch.bfloat16
    )
