"""Identity is content: what shapes answers changes it, what does not leaves it."""

import pytest
import torch

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import Manifest, ManifestBase, write_manifest


def identity(folder):
    return content_identity(read_adapter(folder))


def nudge(tensors):
    name = min(tensors)
    tensors[name].view(-1)[-1] += 1e-3
    return tensors


@pytest.mark.parametrize(
    "change",
    [
        {"lora_dropout": 0.5},
        {"inference_mode": False},
        {"init_lora_weights": "gaussian"},
        {"use_dora": None},
    ],
)
def test_settings_of_training_leave_it(adapter, edit_config, change):
    before = identity(adapter)
    assert identity(edit_config(adapter, **change)) == before


def test_order_and_place_leave_it(adapter, edit_tensors, edit_config, tmp_path):
    before = identity(adapter)
    edit_tensors(adapter, lambda t: dict(reversed(t.items())))
    config = read_adapter(adapter).config
    edit_config(adapter, target_modules=sorted(config["target_modules"], reverse=True))
    adapter.rename(tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"base_model_name_or_path": "another"},
    ],
)
def test_settings_that_shape_answers_change_it(adapter, edit_config, change):
    before = identity(adapter)
    assert identity(edit_config(adapter, **change)) != before


@pytest.mark.parametrize(
    "change",
    [
        nudge,
        lambda t: {n: x.to(torch.bfloat16) for n, x in t.items()},
        lambda t: {f"{n}x": x for n, x in t.items()},
        lambda t: {n: x.reshape(-1) for n, x in t.items()},
    ],
)
def test_tensors_change_it(adapter, edit_tensors, change):
    before = identity(adapter)
    assert identity(edit_tensors(adapter, change)) != before


def test_recorded_base_counts_by_its_fingerprint(adapter):
    def with_base(name, mark):
        base = ManifestBase(
            name=name, fingerprint=mark, quantization="none", dtype="float32", unquantized=None
        )
        write_manifest(adapter, Manifest(base=base))
        return identity(adapter)

    assert with_base("here", "sha256:1") == with_base("moved", "sha256:1")
    assert with_base("here", "sha256:1") != with_base("here", "sha256:2")
