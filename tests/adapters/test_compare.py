"""Sizes and distances of updates, against the full matrices that PEFT makes of them."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.check import check_adapter, compare_adapters
from qlora_serve.adapters.folder import OBJECTS
from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError
from tests.tiny_models import write_random_adapter


def deltas(base, folder):
    """Layer → every update of PEFT in it as one vector, by module."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    )
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer = name.split(".layers.")[1].split(".")[0]
            found.setdefault(layer, {})[name] = module.get_delta_weight("default").double()
    return found


def test_comparison_is_that_of_the_full_matrices(base, tmp_path):
    one = write_random_adapter(tmp_path / "one", base, seed=1)
    # Another rank and scale, fewer targets, and near the first in some layers.
    two = write_random_adapter(
        tmp_path / "two", base, seed=2, r=6, target_modules=["q_proj", "down_proj"], lora_alpha=3
    )
    result = compare_adapters(one, two)
    first, second = deltas(base, one), deltas(base, two)
    assert result["layers"].keys() == first.keys()
    for layer, found in result["layers"].items():
        a = torch.cat([m.flatten() for m in first[layer].values()])
        b = torch.cat(
            [second[layer].get(n, torch.zeros_like(m)).flatten() for n, m in first[layer].items()]
        )
        assert found["first"] == pytest.approx(float(a.norm()), rel=1e-5)
        assert found["second"] == pytest.approx(float(b.norm()), rel=1e-5)
        assert found["cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
        share = float((a - b).norm() / max(a.norm(), b.norm()))
        assert found["difference"] == pytest.approx(share, rel=1e-5)
    assert not result["identical"]
    assert result["settings"].keys() == {"r", "lora_alpha", "target_modules"}
    assert result["settings"]["r"] == [4, 6]


def test_the_same_and_a_scaled_adapter(base, adapter, tmp_path, edit_config):
    same = compare_adapters(adapter, adapter)
    assert same["identical"]
    assert (same["settings"], same["others"]) == ({}, {})
    for layer in same["layers"].values():
        assert layer["difference"] == 0
        assert layer["cosine"] == pytest.approx(1)
    twice = write_random_adapter(tmp_path / "twice", base)
    edit_config(twice, lora_alpha=16)
    scaled = compare_adapters(adapter, twice)
    assert not scaled["identical"]
    for layer in scaled["layers"].values():
        assert layer["second"] == pytest.approx(2 * layer["first"])
        assert layer["cosine"] == pytest.approx(1)
        assert layer["difference"] == pytest.approx(0.5)


def test_what_is_no_low_rank_update_is_compared_too(base, tmp_path, edit_tensors):
    made = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    one = write_random_adapter(tmp_path / "one", base, **made)
    two = write_random_adapter(tmp_path / "two", base, **made)
    assert compare_adapters(one, two)["others"] == {}

    def change(tensors):
        tensors["base_model.model.lm_head.weight"][3, 5] += 0.25
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
        tensors[name][0] -= 0.5
        return tensors

    others = compare_adapters(one, edit_tensors(two, change))["others"]
    assert others == {
        "lm_head.weight": pytest.approx(0.25),
        "model.layers.1.self_attn.q_proj (magnitude)": pytest.approx(0.5),
    }


def test_dead_modules_are_named(adapter, edit_tensors):
    def change(tensors):
        for name, tensor in tensors.items():
            if "layers.1.mlp.up_proj.lora_B" in name or "layers.0.mlp.up_proj.lora_A" in name:
                tensor.zero_()
        return tensors

    result = check_adapter(edit_tensors(adapter, change))
    assert result["dead_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert "2 of 21 modules is zero" in result["warnings"][0]


def test_content_that_changed_in_the_store_is_damage(adapter, tmp_path, edit_tensors):
    store = AdapterStore(tmp_path / "store")
    path = store.add("mine", find_source(str(adapter)), str(adapter)).entry.path
    assert path.parent.name == OBJECTS
    assert check_adapter(path)["ok"]

    def change(tensors):
        tensors[min(tensors)][0, 0] += 1
        return tensors

    edit_tensors(path, change)
    with pytest.raises(AdapterError, match="is damaged"):
        check_adapter(path)
