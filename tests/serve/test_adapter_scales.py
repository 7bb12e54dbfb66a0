"""A request's own scale, and several adapters at once, give what PEFT gives for them alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_batch import mixed_rows, reference
from peft import PeftModel
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import RequestError
from qlora_serve.serve.engine import runner as runner_module
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.runner import Runner

TOLERANCE = 1e-4  # float32, on logits of magnitude about 10

_FEW = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rs": {"use_rslora": True, "r": 8, "lora_alpha": 4},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "fc2": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"o_proj": 3, "dense": 3},
    },
    "few": {"target_modules": _FEW},
    "lora-bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora": {"use_dora": True, "use_rslora": True},
    "dora-embedding": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
}
SCALED = {
    "plain*0.5": [("plain", 0.5)],
    "plain*-1.5": [("plain", -1.5)],
    "plain*0": [("plain", 0.0)],
    "plain": [("plain", None)],
    "rs*2": [("rs", 2.0)],
    "patterns*0.3": [("patterns", 0.3)],
    "lora-bias*3": [("lora-bias", 3.0)],
    "embedding*0.7": [("embedding", 0.7)],
    "dora*0.4": [("dora", 0.4)],
    "dora": [("dora", None)],
    "dora-embedding*1.6": [("dora-embedding", 1.6)],
}
COMPOSED = {
    "plain+rs": [("plain", 1.0), ("rs", 0.6)],
    "few+patterns+rs": [("few", -0.8), ("patterns", 1.2), ("rs", 0.25)],
    "embedding+lora-bias": [("embedding", 0.5), ("lora-bias", 1.0)],
}


def _write(folder: Path, family: str, kinds: dict[str, dict]) -> tuple[Path, dict[str, Path]]:
    base = write_tiny_model(folder / "base", family)
    return base, {
        name: write_random_adapter(folder / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(kinds.items())
    }


def _registry(base: Path, paths: dict[str, Path], **limits: int) -> AdapterRegistry:
    registry = AdapterRegistry(Runner(load_base(str(base), dtype="float32")), **limits)
    for name, path in paths.items():
        registry.load(name, path)
    return registry


def _scaled_reference(base: Path, paths: dict[str, Path], wanted: list) -> Any:
    """Several adapters active at once in PEFT, each with its own scale."""
    first = wanted[0][0]
    model: Any = PeftModel.from_pretrained(reference(base, None), paths[first], first)
    for name, _ in wanted[1:]:
        model.load_adapter(paths[name], name)
    model.base_model.set_adapter([name for name, _ in wanted])
    for module in model.modules():
        if hasattr(module, "set_scale"):
            for name, scale in wanted:
                module.set_scale(name, 1.0 if scale is None else scale)
    return model.eval()


def _catenated_reference(base: Path, paths: dict[str, Path], wanted: list) -> Any:
    """PEFT's own composition, with concatenated ranks."""
    first = wanted[0][0]
    model: Any = PeftModel.from_pretrained(reference(base, None), paths[first], first)
    for name, _ in wanted[1:]:
        model.load_adapter(paths[name], name)
    names, weights = [n for n, _ in wanted], [w for _, w in wanted]
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


def _acquired(registry: AdapterRegistry, wanted: list) -> Any:
    selection = registry.select(wanted)
    for slot in selection.slots:
        if slot.state == "absent":  # what the loader does
            slot.resident, slot.size = registry._load_slot(slot)
            slot.state = "resident"
    return selection


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("by", ["kernels", "torch"])
@pytest.mark.parametrize("family", ["llama", "phi"])
@torch.inference_mode()
def test_scales_and_compositions_match_peft(family, by, tmp_path: Path, monkeypatch) -> None:
    """All in one batch, prefill and decode, beside the base."""
    if by == "torch":
        monkeypatch.setattr(runner_module, "load_kernels", lambda: None)
    base, paths = _write(tmp_path, family, KINDS)
    registry = _registry(base, paths)
    wanted = SCALED | COMPOSED
    selections = {name: _acquired(registry, parts) for name, parts in wanted.items()}
    runner = registry._runner
    lengths = {"base": 21} | {name: 6 + 5 * n % 31 for n, name in enumerate(wanted)}
    found = mixed_rows(runner, selections, lengths)
    plain = reference(base, None)
    for name, one in found.items():
        tokens = torch.tensor([one.tokens])
        from_base = plain(tokens).logits[0, one.first :]
        if name == "base":
            assert (one.logits - from_base).abs().max() < TOLERANCE
            continue
        model = _scaled_reference(base, paths, wanted[name])
        expected = model(tokens).logits[0, one.first :]
        error = (one.logits - expected).abs().max().item()
        # Logits of a strong composition are larger, and their rounding with them.
        assert error < TOLERANCE * max(1.0, expected.abs().max().item() / 10), f"{name}: {error}"
        if name != "plain*0":
            assert (expected - from_base).abs().max() > 0.1, name
        if name in ("plain+rs", "few+patterns+rs"):
            catenated = _catenated_reference(base, paths, wanted[name])
            again = catenated(tokens).logits[0, one.first :]
            assert (one.logits - again).abs().max() < TOLERANCE, name


def test_the_key_holds_content_and_scale_and_not_names(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama", {"one": {}, "two": {"r": 2}})
    registry = _registry(base, paths | {"again": paths["one"]})
    assert registry.select([("one", 0.5)]).key == registry.select([("again", 0.5)]).key
    assert registry.select([("one", 0.5)]).key != registry.select([("one", None)]).key
    both = registry.select([("one", 1.0), ("two", 0.5)])
    assert both.name == "one+two"
    # The order in which a request lists them changes nothing, not even the last bit.
    assert both.key == registry.select([("two", 0.5), ("one", 1.0)]).key
    registry.update("one", default_scale=0.5)
    assert registry.resolve("one").key == registry.select([("again", 0.5)]).key


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, r"replaced modules \(modules_to_save\)"),
        ({"bias": "all"}, r"trained biases \(bias=all\)"),
        ({"trainable_token_indices": [3, 4]}, "trained tokens"),
        ({"use_dora": True, "bias": "lora_only"}, "trained biases"),
    ],
)
def test_kinds_without_a_scale_or_a_sum_are_refused(settings, words, tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "phi", {"it": settings | {"target_modules": _FEW}, "other": {}})
    registry = _registry(base, paths)
    registry.select([("it", None)])
    registry.select([("it", 1.0)])
    with pytest.raises(RequestError, match=f"'it' cannot be scaled by 0.5: it has {words}"):
        registry.select([("it", 0.5)])
    with pytest.raises(RequestError, match=f"'it' cannot be part of a composition.*{words}"):
        registry.select([("other", 1.0), ("it", 1.0)])
    with pytest.raises(RequestError, match="'it' cannot be scaled"):
        registry.update("it", default_scale=2.0)


def test_dora_is_scaled_but_not_summed(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama", {"it": {"use_dora": True}, "other": {}})
    registry = _registry(base, paths)
    registry.select([("it", 0.5)])
    with pytest.raises(RequestError, match="it has DoRA, for which a sum is not defined"):
        registry.select([("other", 1.0), ("it", 1.0)])
