"""The weights of the base as numbers, whatever they are stored as."""

from typing import Any

import torch
from torch import Tensor

from qlora_serve.base.gptq import is_gptq
from qlora_serve.errors import AdapterError


def dense_weight(module: Any, name: str) -> Tensor:
    """A linear layer's weight in float32, dequantized: [out_features, in_features].

    Only reads, so that another thread may run the layer meanwhile.

    Raises:
        AdapterError: the weight is stored in a way that cannot be read back.
    """
    if is_gptq(module):
        return module.dequantize_weight().t().float()
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The first forward pass moves the scales from the weight to the state, in this order.
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return int8_vectorwise_dequant(weight.data, scales).float()
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise AdapterError(
            f"DoRA needs the weight of {name}, which this base stores as {type(module).__name__}; "
            "serve the adapter on the unquantized base"
        )
    return weight.detach().float()


def dora_gain(weight: Tensor, pair: Any) -> Tensor:
    """What each output is multiplied by: magnitude / ‖row of W + scaling * B A‖ (arXiv:2402.09353).

    Args:
        weight: float32 [out_features, in_features]
        pair: a `LoraPair` with a magnitude.

    Returns:
        float32 [out_features]
    """
    device = weight.device
    a, b = pair.a.to(device, torch.float32), pair.b.to(device, torch.float32)
    lengths = torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=pair.scaling), dim=1)
    gain: Tensor = pair.magnitude.to(device, torch.float32) / lengths
    return gain


def require_same(adapter: str, name: str, copied: Tensor, module: Any) -> None:
    """Checks that a base weight which an adapter's file repeats is the one of this base.

    PEFT saves the base's embedding beside an embedding LoRA, and reads it back over the base's.
    It differs where the embedding was resized or trained, and the low-rank update alone is then
    not the adapter. Equal after rounding to either dtype counts as the same.

    Raises:
        AdapterError: it is another weight.
    """
    own = module.weight.detach()
    copied = copied.to(own.device)
    is_comparable = copied.shape == own.shape and own.is_floating_point()
    if not is_comparable or not (
        torch.equal(copied.to(own.dtype), own) or torch.equal(own.to(copied.dtype), copied)
    ):
        raise AdapterError(
            f"adapter {adapter!r} was trained with another weight of {name} than this base has "
            "(resized, trained, or from another base), so its update would not fit"
        )
