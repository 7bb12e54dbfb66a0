"""Is the adapter on disk the one that was trained? Asked before it is published."""

from pathlib import Path
from typing import Any

import torch

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import check_finite
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import AdapterError, TrainError

# The saved adapter computes the same sums on the same numbers, so that only rounding may differ.
# Relative to the largest logit, for what the base computes in.
_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}

_RELOADED = "reloaded"


def verify_saved(
    model: Any, folder: Path, source: BaseSource, probes: list[list[int]], dtype: str
) -> None:
    """Checks a saved adapter against the trained model that it was saved from.

    It must fit its base, hold finite numbers and at least one update, equal the trained tensors
    bit for bit, and give the trained model's logits when PEFT loads it again.

    Args:
        model: the trained PEFT model.
        folder: the saved adapter.
        source: its base.
        probes: token ids of prompts, whose logits are compared at every position.
        dtype: what the base computes in.

    Raises:
        TrainError: a check failed.
    """
    from peft import get_peft_model_state_dict

    try:
        adapter = read_adapter(folder)
        FitChecker(source).check(adapter)
        saved = adapter.load_tensors()
        check_finite(adapter, saved)
    except AdapterError as error:
        raise TrainError(f"the trained adapter cannot be used: {error}") from None
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    _compare_tensors(saved, trained)
    if not any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name):
        raise TrainError("the trained adapter changes nothing: every lora_B is zero")
    _compare_logits(model, folder, probes, _TOLERANCES[dtype])


def _compare_tensors(saved: dict[str, Any], trained: dict[str, Any]) -> None:
    different = [
        name
        for name in sorted(saved.keys() | trained.keys())
        if name not in saved
        or name not in trained
        or not torch.equal(saved[name], trained[name].detach().cpu())
    ]
    if different:
        raise TrainError(
            f"the saved adapter differs from the trained one in {len(different)} tensors, first "
            f"{different[0]}; the disk may be faulty"
        )


def _compare_logits(model: Any, folder: Path, probes: list[list[int]], tolerance: float) -> None:
    model.eval()
    model.load_adapter(folder, _RELOADED)
    try:
        for number, probe in enumerate(probes, start=1):
            first = _logits(model, "default", probe)
            second = _logits(model, _RELOADED, probe)
            limit = tolerance * max(1.0, float(first.abs().max()))
            difference = float((first - second).abs().max())
            if not difference <= limit:  # also when it is NaN
                raise TrainError(
                    f"the saved adapter answers otherwise than the trained one: on probe {number} "
                    f"of {len(probes)} logits differ by {difference:.2g}, allowed {limit:.2g}"
                )
    finally:
        model.set_adapter("default")
        model.delete_adapter(_RELOADED)


@torch.no_grad()
def _logits(model: Any, adapter: str, probe: list[int]) -> torch.Tensor:
    model.set_adapter(adapter)
    input_ids = torch.tensor([probe], device=model.device)
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()  # [1, length, vocabulary]
