"""An adapter from a full fine-tune."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.errors import MergeError
from qlora_serve.merge.config import ExtractSettings
from qlora_serve.merge.extract import extract_adapter
from tests.tiny_models import write_tiny_model


def fine_tune(base, folder, rank=3, others=()):
    """Writes a copy of a base whose linear layers moved by updates of a known rank."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                out, into = parameter.shape
                parameter += 0.1 * torch.randn(out, rank) @ torch.randn(rank, into)
            if any(part in name for part in others):
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_update_of_known_rank_is_found(tiny, tmp_path, family):
    tuned = fine_tune(tiny(family), tmp_path / "tuned", rank=3)
    settings = {"model": str(tuned), "base": str(tiny(family))}
    report = extract_adapter(
        ExtractSettings.model_validate(settings | {"output": tmp_path / "all", "energy": 0.99999})
    )
    assert set(report.ranks.values()) == {3}
    assert report.adapter_against_model.relative_difference < 1e-3
    assert report.adapter_against_model.mean_kl < 1e-6 < report.base_against_model.mean_kl
    small = extract_adapter(
        ExtractSettings.model_validate(settings | {"output": tmp_path / "small", "rank": 2})
    )
    assert set(small.ranks.values()) == {2}
    assert report.error < 0.01 < small.error < 1
    assert small.kept_energy == pytest.approx(1 - small.error**2)


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_other_changes_are_refused_or_saved_whole(tiny, tmp_path, family):
    tuned = fine_tune(tiny(family), tmp_path / "tuned", others=("model.norm", "embed_tokens"))
    settings = {"model": str(tuned), "base": str(tiny(family)), "output": tmp_path / "out"}
    settings["energy"] = 0.99999
    with pytest.raises(MergeError, match="--save-others"):
        extract_adapter(ExtractSettings.model_validate(settings))
    assert not (tmp_path / "out").exists()
    report = extract_adapter(ExtractSettings.model_validate(settings | {"save_others": True}))
    assert report.saved_whole == ["model.embed_tokens", "model.norm"]
    assert report.adapter_against_model.relative_difference < 1e-3


def test_what_is_no_fine_tune(tiny, tmp_path):
    cases = [
        (tiny("llama"), tiny("llama"), "the same weights"),
        (tiny("qwen2"), tiny("llama"), "not a fine-tune"),
        (tiny("llama-untied"), tiny("llama"), "lm_head.weight fits only one"),
    ]
    for model, base, words in cases:
        settings = ExtractSettings(model=str(model), base=str(base), output=tmp_path / "out")
        with pytest.raises(MergeError, match=words):
            extract_adapter(settings)
    other = write_tiny_model(tmp_path / "other", "llama", seed=7)
    settings = ExtractSettings(model=str(other), base=str(tiny("llama")), output=tmp_path / "out")
    with pytest.raises(MergeError, match="--save-others"):
        extract_adapter(settings)
