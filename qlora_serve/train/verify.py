"""Is what lies on disk what was trained? Asked before it is published."""

from pathlib import Path
from typing import Any

import torch

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import check_finite
from qlora_serve.base.load import LoadedBase
from qlora_serve.errors import AdapterError, TrainError
from qlora_serve.train import save
from qlora_serve.train.parallel import is_split

# The saved adapter computes the same sums on the same numbers, so that only rounding may differ.
# Relative to the largest logit, for what the base computes in.
_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
# A converted adapter has its start added and subtracted once more.
_CONVERTED_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

_RELOADED = "reloaded"


def verify_saved(
    model: Any,
    folder: Path,
    base: LoadedBase,
    trained: dict[str, torch.Tensor],
    probes: list[list[int]],
) -> None:
    """Checks a saved adapter against the trained model that it was saved from.

    It must fit its base, hold finite numbers and at least one update, equal the trained tensors
    bit for bit, and give the trained model's logits when PEFT loads it again. One that was
    converted to fit the base as it was, or has biases, is put on a fresh copy of that base. Where
    weights are split and one process alone cannot compute logits, the tensors have to do.

    Args:
        model: the trained PEFT model.
        folder: the saved adapter.
        base: what it was trained on.
        trained: the trained tensors, see `save.trained_tensors`.
        probes: token ids of prompts, whose logits are compared at every position.

    Raises:
        TrainError: a check failed.
    """
    try:
        adapter = read_adapter(folder)
        FitChecker(base.source).check(adapter)
        saved = adapter.load_tensors()
        check_finite(adapter, saved)
    except AdapterError as error:
        raise TrainError(f"the trained adapter cannot be used: {error}") from None
    _check_some_update(saved, model)
    if save.is_converted(model):
        _compare_with_fresh_base(model, folder, base, probes, _CONVERTED_TOLERANCES[base.dtype])
        return
    _compare_tensors(saved, save.adapter_tensors(model, trained), "adapter")
    if is_split(model):
        return
    if model.peft_config["default"].bias != "none":  # of which PEFT takes only one at a time
        _compare_with_fresh_base(model, folder, base, probes, _TOLERANCES[base.dtype])
    else:
        _compare_logits(model, folder, probes, _TOLERANCES[base.dtype])


def verify_model(
    model: Any,
    folder: Path,
    trained: dict[str, torch.Tensor],
    probes: list[list[int]],
    dtype: str,
) -> None:
    """Checks a saved model against the trained one: finite, equal tensors, the same logits.

    Raises:
        TrainError: a check failed.
    """
    from transformers import AutoModelForCausalLM

    wanted = getattr(torch, dtype)
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
    saved = {name: parameter.detach() for name, parameter in reloaded.named_parameters()}
    broken = [name for name, tensor in saved.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise TrainError(f"the trained model holds NaN or infinite values, first in {broken[0]}")
    rounded = {name: tensor.to(wanted) for name, tensor in trained.items()}
    _compare_tensors(saved, rounded, "model")
    if is_split(model):
        return
    reloaded = reloaded.float().to(model.device).eval()
    model.eval()
    tolerance = _TOLERANCES[dtype]
    for number, probe in enumerate(probes, start=1):
        _compare(_logits(model, probe), _logits(reloaded, probe), tolerance, number, len(probes))


def _check_some_update(saved: dict[str, Any], model: Any) -> None:
    """Whether the adapter does anything at all."""
    config = model.peft_config["default"]
    if config.modules_to_save or config.trainable_token_indices:
        return  # only the base could tell
    updates = [
        tensor for name, tensor in saved.items() if "lora_B" in name or "embedding_B" in name
    ]
    if not any(bool(tensor.any()) for tensor in updates):
        raise TrainError("the trained adapter changes nothing: every lora_B is zero")


def _compare_tensors(
    saved: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], what: str
) -> None:
    different = [
        name
        for name in sorted(saved.keys() | trained.keys())
        if name not in saved
        or name not in trained
        or not torch.equal(saved[name], trained[name].detach().cpu())
    ]
    if different:
        raise TrainError(
            f"the saved {what} differs from the trained one in {len(different)} tensors, first "
            f"{different[0]}; the disk may be faulty"
        )


def _compare_logits(model: Any, folder: Path, probes: list[list[int]], tolerance: float) -> None:
    model.eval()
    model.load_adapter(folder, _RELOADED)
    try:
        for number, probe in enumerate(probes, start=1):
            model.set_adapter("default")
            first = _logits(model, probe)
            model.set_adapter(_RELOADED)
            second = _logits(model, probe)
            _compare(first, second, tolerance, number, len(probes))
    finally:
        model.set_adapter("default")
        model.delete_adapter(_RELOADED)


def _compare_with_fresh_base(
    model: Any, folder: Path, base: LoadedBase, probes: list[list[int]], tolerance: float
) -> None:
    from peft import PeftModel

    from qlora_serve.base.load import load_base

    stored = base.source.quantization != "none"
    config = getattr(base.model.config, "quantization_config", None)
    fresh = load_base(
        base.source.name,
        "none" if stored else base.quantization,  # type: ignore[arg-type]
        base.dtype,  # type: ignore[arg-type]
        str(base.device),
        bool(getattr(config, "bnb_4bit_use_double_quant", True)),
    )
    tokens = len(base.model.get_input_embeddings().weight)
    if tokens > len(fresh.model.get_input_embeddings().weight):
        fresh.model.resize_token_embeddings(tokens, mean_resizing=False)
    reloaded = PeftModel.from_pretrained(fresh.model, folder)
    reloaded.eval()
    model.eval()
    for number, probe in enumerate(probes, start=1):
        _compare(_logits(model, probe), _logits(reloaded, probe), tolerance, number, len(probes))


def _compare(
    first: torch.Tensor, second: torch.Tensor, tolerance: float, number: int, count: int
) -> None:
    limit = tolerance * max(1.0, float(first.abs().max()))
    difference = float((first - second).abs().max())
    if not difference <= limit:  # also when it is NaN
        raise TrainError(
            f"what was saved answers otherwise than what was trained: on probe {number} of {count} "
            f"logits differ by {difference:.2g}, allowed {limit:.2g}"
        )


@torch.no_grad()
def _logits(model: Any, probe: list[int]) -> torch.Tensor:
    input_ids = torch.tensor([probe], device=model.device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()  # [1, length, vocabulary]
