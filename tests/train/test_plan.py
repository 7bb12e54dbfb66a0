"""What a plan says, against PEFT's counts and the memory of real steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_serve.base.source import locate_base
from qlora_serve.errors import BaseModelError, ConfigError
from qlora_serve.settings import load_settings
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.model import add_lora
from qlora_serve.train.plan.advice import CARDS_GIB, card_fits, usable
from qlora_serve.train.plan.config import PlanSettings
from qlora_serve.train.plan.estimate import Planner, plan
from qlora_serve.train.plan.trace import Ledger, Step, training_peak
from qlora_serve.train.plan.weights import Scheme, base_bytes, state_bytes
from tests.tiny_models import CONFIGS, write_tiny_model

QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def _planner(base: Path, **settings: Any) -> Planner:
    return Planner(PlanSettings(base=str(base), **settings))


def test_qwen25_7b_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B))
    planner = _planner(tmp_path, rank=8, target_modules=SEVEN, micro_batch=4, max_length=384)
    found = plan(planner)
    assert found.parameters.trainable == 20_185_088
    assert found.parameters.total == 7_635_801_600  # the adapter included
    assert f"{found.parameters.share:.4f}" == "0.2643"
    assert sum(found.parameters.by_component.values()) == found.parameters.total
    assert found.parameters.by_component["output head"] == 152064 * 3584
    # 2 bytes a frozen weight, 16 bytes a trained one.
    training = found.training
    assert abs(training.weights - 2 * 7_615_616_512) < 10_000  # and the rotary buffers
    assert training.adapter + training.gradients + training.optimizer == 16 * 20_185_088
    # Keys and values of 28 layers, 4 heads of 128, in bfloat16.
    assert found.serving.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    cards = {card.card_gib: card for card in card_fits(planner, found)}
    assert list(cards) == list(CARDS_GIB)
    assert cards[80].fits
    assert not cards[16].serving_fits  # 14.2 GiB of weights leave no room for the rest
    assert cards[24].advice == ["--gradient-checkpointing"]
    assert cards[16].advice[-1] == "--quantization nf4"
    for card in cards.values():
        if card.advised_total is not None:
            assert card.advised_total <= usable(card.card_gib)


def test_fsdp_divides_what_torch_divides(tmp_path: Path) -> None:
    """Two layers of Qwen2.5-7B by hand, over 4 processes, and what is gathered for a moment."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B | {"num_hidden_layers": 2}))
    recipe = {"rank": 8, "target_modules": SEVEN, "micro_batch": 1, "max_length": 384}
    found = plan(_planner(tmp_path, processes=4, **recipe))
    assert [stage.stage for stage in found.stages] == ["ddp", "zero1", "zero2", "zero3", "fsdp"]
    totals = [stage.memory.total for stage in found.stages[:3]]
    assert totals == sorted(totals, reverse=True)
    fsdp = found.stages[-1].memory
    attention = 3584 * 3584 + 3584 + 2 * (512 * 3584 + 512) + 3584 * 3584
    layer = attention + 3 * 3584 * 18944 + 2 * 3584
    vocabulary, norm, adapter = 152064 * 3584, 3584, 2 * 20_185_088 // 28
    weights = 2 * layer + 2 * vocabulary + norm
    assert 0 <= fsdp.weights - 2 * weights // 4 < 10_000  # rotary buffers are not divided
    assert fsdp.adapter == fsdp.gradients == 4 * adapter // 4
    assert fsdp.optimizer == 2 * 4 * adapter // 4
    # A layer and the next one in bfloat16, their float32 gradients, final norm and output head.
    two_layers = 2 * (2 * layer + (2 + 4) * adapter // 2)
    assert fsdp.communication == two_layers + 2 * (vocabulary + norm)
    # No process has the output head to itself: all logits exist at once, and so in ZeRO-3.
    zero2, zero3 = (found.stages[n].memory for n in (2, 3))
    assert fsdp.activations == zero3.activations > zero2.activations == found.training.activations


@pytest.mark.parametrize("kind", ["qwen2", "phi"])
def test_fsdp_holds_what_torch_makes_it_hold(kind: str, tmp_path: Path) -> None:
    """The oracle is torch's own `fully_shard`, in a group whose other processes do not exist."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from qlora_serve.base.load import load_base

    base = write_tiny_model(tmp_path / "base", kind)
    planner = _planner(base, device="cpu", rank=3, max_length=32, processes=4)
    held = plan(planner).stages[-1].memory
    loaded = load_base(str(base), device="cpu")
    chosen = TrainSettings(base=str(base), data=("d.jsonl",), output="o", rank=3)
    model = add_lora(loaded, chosen, str(base))
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        local = [(p.requires_grad, p._local_tensor.numel()) for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert held.adapter == 4 * sum(count for trained, count in local if trained)
    assert held.weights == buffers + 4 * sum(count for trained, count in local if not trained)


def test_full_fine_tuning_holds_its_weights_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B))
    planner = _planner(tmp_path, method="full", micro_batch=1, max_length=128)
    found = plan(planner)
    count = found.parameters.total
    assert found.parameters.trainable == count == 7_615_616_512
    # Weights, gradients and two moments, all in float32.
    training = found.training
    fixed = training.weights + training.adapter + training.gradients + training.optimizer
    assert abs(fixed - 16 * count) < 10_000
    assert found.serving.adapters == 0
    advice = [card.advice for card in card_fits(planner, found)]
    assert advice[-1] == ["--gradient-checkpointing", "--method lora"]
    # What is advised is no contradiction.
    assert advice[1][:3] == ["--gradient-checkpointing", "--method lora", "--quantization nf4"]


def test_nothing_but_config_json_is_read(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    found = plan(_planner(tmp_path, device="cpu"))
    assert found.parameters.total > found.parameters.trainable > 0


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_traced_peak_is_that_of_a_real_step(
    kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    """The same ledger over a real step on real tensors is the oracle."""
    from qlora_serve.base.load import load_base
    from qlora_serve.train.fast_lora import fast_lora
    from qlora_serve.train.layout import Layout

    base = write_tiny_model(tmp_path / "base", kind)
    settings = {"rank": 4, "gradient_checkpointing": checkpointing, "max_length": 32}
    planner = _planner(base, device="cpu", micro_batch=2, **settings)
    planned = planner.training(planner.given)

    loaded = load_base(str(base), device="cpu")
    chosen = TrainSettings(base=str(base), data=("d.jsonl",), output="o", **settings)
    model = add_lora(loaded, chosen, str(base))
    model.train()
    rows = [{"input_ids": list(range(5, 37)), "labels": list(range(5, 37))}] * 2
    layout = Layout(model, packing=False)
    batch = layout.collate(rows)
    ledger = Ledger()
    ledger.know_all(model)
    with fast_lora(model), layout.over(batch), ledger:
        layout.loss(model, batch).backward()
    assert planned.gradients + planned.activations == pytest.approx(ledger.peak, rel=0.03)


def test_every_recipe_key_is_taken(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"base: {tiny}\ndata: rows.jsonl\noutput: out\nlearning_rate: 1e-4\nrank: 2\nseed: 3\n"
    )
    settings = load_settings(PlanSettings, recipe, {})
    assert Planner(settings).parameters.trainable > 0
    assert set(TrainSettings.model_fields) <= set(PlanSettings.model_fields)


def test_less_is_less(tiny: Path) -> None:
    whole = _planner(tiny, device="cpu", micro_batch=4, max_length=128)
    given = whole.training(whole.given).total
    for change in (
        {"gradient_checkpointing": True}, {"micro_batch": 1}, {"max_length": 64},
        {"trained_share": 0.2}, {"dtype": "bfloat16"},
    ):  # fmt: skip
        settings = {"micro_batch": 4, "max_length": 128} | change
        less = _planner(tiny, device="cpu", **settings)
        assert less.training(less.given).total < given, change


def test_quantized_bytes_are_those_of_bitsandbytes(tiny: Path) -> None:
    from qlora_serve.base.load import load_base
    from qlora_serve.base.skeleton import build_skeleton

    skeleton = build_skeleton(locate_base(str(tiny)))
    for double in (True, False):
        loaded = load_base(str(tiny), "nf4", device="cpu", double_quantization=double)
        held = 0
        for parameter in loaded.model.parameters():
            held += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                held += state.absmax.numel() * state.absmax.element_size()
                if state.nested:
                    held += state.state2.absmax.numel() * 4
        counted = base_bytes(skeleton, Scheme("nf4", double=double), "float32", False)
        buffers = sum(b.numel() * b.element_size() for b in skeleton.buffers())
        assert counted - buffers == held


def test_optimizer_states_are_those_of_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    state = optimizer.state[weight]
    held = sum(t.numel() * 4 for t in (state["exp_avg"], state["exp_avg_sq"]))
    assert state_bytes("adamw", (128, 64)) == held
    assert state_bytes("adamw-8bit", (128, 64)) < held / 3.8
    assert state_bytes("paged-adamw-8bit", (8, 8)) == 8 * 64  # small ones stay float32
    assert state_bytes("adafactor", (128, 64)) == 4 * (128 + 64)
    assert state_bytes("sgd", (128, 64)) == 0


def test_what_cannot_be_planned_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the 512 tokens"):
        plan(_planner(tiny, max_length=4096))
    with pytest.raises(ConfigError, match="match nothing"):
        _planner(tiny, target_modules="query")
    with pytest.raises(BaseModelError, match="no base model"):
        _planner(tmp_path / "none")
    with pytest.raises(ValueError, match="rank"):
        PlanSettings(base="b", rank=0)


def test_the_plain_model_is_what_transformers_builds(tiny: Path) -> None:
    found = plan(_planner(tiny, device="cpu", rank=3))
    real = AutoModelForCausalLM.from_pretrained(tiny)
    assert found.parameters.total - found.parameters.trainable == real.num_parameters()
    assert _ledger_is_exact()


def _ledger_is_exact() -> bool:
    ledger = Ledger()
    with ledger:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second[:10]  # a view is no storage of its own
        del second
        live, peak = ledger.live, ledger.peak
        del third
    return (live, peak, ledger.live) == (4000, 8000, 0)


def test_a_step_does_not_depend_on_the_one_before(tiny: Path) -> None:
    planner = _planner(tiny, device="cpu", micro_batch=2, max_length=64)
    step = Step(2, 64, 126, "float32")
    peaks = [training_peak(planner.model, step, Scheme("none")) for _ in range(2)]
    training_peak(planner.model, step, Scheme("nf4"))
    peaks.append(training_peak(planner.model, step, Scheme("none")))
    assert len(set(peaks)) == 1
