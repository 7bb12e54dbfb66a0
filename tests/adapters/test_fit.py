"""Right or refused: tensors against a base, with PEFT as the oracle."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import peft.import_utils
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.gptq import no_gptq_layers
from qlora_serve.base.source import locate_base
from qlora_serve.errors import AdapterError
from tests.tiny_models import write_random_adapter, write_tiny_model

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="session")
def fit(base):
    return FitChecker(locate_base(str(base)))


def spoil_with(value):
    def change(tensors):
        tensors[A][0, 0] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: x for n, x in t.items() if n != A}, f"1 tensor is missing .*{A}"),
        (lambda t: t | {"extra.weight": t[A].clone()}, "1 tensor matches nothing .*extra.weight"),
        (lambda t: t | {A: t[A][:, :32].contiguous()}, "4×32, expected 4×64"),
        (lambda t: t | {A: t[A][:2].contiguous()}, "2×64, expected 4×64"),
        (lambda t: {f"wrong.{n}": x for n, x in t.items()}, "missing .* match nothing"),
        (lambda t: {}, "missing"),
        (spoil_with(float("nan")), "NaN or infinite"),
        (spoil_with(float("inf")), "NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(adapter, fit, edit_tensors, change, words):
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=words) as caught:
        load_weights(read_adapter(adapter), fit)
    assert "\n" not in str(caught.value)


def test_numbers_whose_sum_is_too_large_are_finite_all_the_same(adapter, fit, edit_tensors):
    edit_tensors(adapter, lambda t: t | {A: torch.full_like(t[A], 3e38)})
    assert load_weights(read_adapter(adapter), fit).modules


@pytest.mark.parametrize("kind", ["phi", "phi3"])
def test_adapter_for_another_base(tmp_path, fit, kind):
    other = write_tiny_model(tmp_path / "other", kind)
    adapter = write_random_adapter(tmp_path / "a", other)
    with pytest.raises(AdapterError, match="does not fit"):
        load_weights(read_adapter(adapter), fit)


def test_targets_that_match_nothing(adapter, fit, edit_config):
    edit_config(adapter, target_modules=["nothing_here"])
    with pytest.raises(AdapterError, match="cannot be put on the base"):
        load_weights(read_adapter(adapter), fit)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 9},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"rank_pattern": {"layers.1.mlp.up_proj": 8}, "use_rslora": True},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.[02]\.self_attn\.(k|o)_proj"},
        {"exclude_modules": ["gate_proj"]},
    ],
)
def test_scalings_and_pairs_are_those_of_peft(base, tmp_path, fit, settings):
    folder = write_random_adapter(tmp_path / "a", base, **settings)
    weights = load_weights(read_adapter(folder), fit)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    )
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert layers.keys() == weights.modules.keys()
    for name, pair in weights.modules.items():
        assert pair.scaling == pytest.approx(layers[name].scaling["default"], rel=1e-12)
        assert pair.a.equal(layers[name].lora_A["default"].weight)
        assert pair.b.equal(layers[name].lora_B["default"].weight)
        delta = pair.scaling * pair.b @ pair.a
        torch.testing.assert_close(delta, layers[name].get_delta_weight("default"))
    assert weights.max_rank == max(layer.r["default"] for layer in layers.values())
    assert not weights.is_dead


def test_dead_adapter_is_seen(adapter, fit, edit_tensors):
    edit_tensors(adapter, lambda t: {n: x * 0 if "lora_B" in n else x for n, x in t.items()})
    assert load_weights(read_adapter(adapter), fit).is_dead


def test_start_that_changes_the_base_is_refused(adapter, fit, edit_config):
    edit_config(adapter, init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="changes the base"):
        load_weights(read_adapter(adapter), fit)


def test_fit_accepts_what_peft_saves(base, tmp_path, fit):
    for number, settings in enumerate(
        [
            {"use_dora": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["embed_tokens"]},
            {"bias": "lora_only"},
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
        ]
    ):
        folder = write_random_adapter(tmp_path / str(number), base, **settings)
        expected = fit.check(read_adapter(folder))
        scale = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] / 4
        assert {module.scaling for module in expected.modules.values()} == {scale}


def test_threads_that_check_adapters_at_once_leave_peft_as_it_was():
    before = peft.import_utils.is_gptqmodel_available
    inside, leave, entered, ended = (threading.Event() for _ in range(4))

    def first() -> None:
        with no_gptq_layers():
            inside.set()
            assert leave.wait(60)

    def second() -> None:
        with no_gptq_layers():
            entered.set()
            assert ended.wait(60)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert inside.wait(60)
        other = pool.submit(second)
        entered.wait(0.3)  # which comes only where the second does not wait for the first
        leave.set()
        one.result()
        ended.set()
        other.result()
    assert peft.import_utils.is_gptqmodel_available is before
