"""LoRA layers in fewer passes over memory, for training on a CPU.

PEFT computes `base(x) + B(A(x)) * scaling` as five operations, each of which writes or adds a
tensor as large as the layer's output, forward and backward. Here the update is added by the matrix
product itself, in one function with its own gradient, which also keeps nothing that it does not
need: the input and the small product with A.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_serve.base.matmul import linear, product

Weight = Callable[[], Tensor]


@contextmanager
def fast_lora(model: Any, adapter: str = "default") -> Iterator[int]:
    """Lets a PEFT model's plain LoRA layers use `lora_linear`; yields how many do.

    Those with dropout, biases, variants (DoRA) or several adapters keep PEFT's own forward.
    """
    replaced = []
    try:
        for module in model.modules():
            weight = _dense_weight(module, adapter)
            if weight is not None:
                module.forward = _forward_of(module, weight, adapter)
                replaced.append(module)
        yield len(replaced)
    finally:
        for module in replaced:
            del module.forward


def _dense_weight(module: Any, adapter: str) -> Weight | None:
    """How to get the weight [out, in] of a layer that `lora_linear` computes; None if it cannot."""
    from peft.tuners.lora import Linear, LoraLayer

    is_lora: bool = isinstance(module, LoraLayer)
    if not is_lora or set(module.lora_A) != {adapter}:
        return None
    down: Any = module.lora_A[adapter]
    up: Any = module.lora_B[adapter]
    is_plain: bool = (
        adapter not in module.lora_variant
        and _is(module.lora_dropout[adapter], torch.nn.Identity)
        and _is(down, torch.nn.Linear)
        and _is(up, torch.nn.Linear)
        and down.bias is None
        and up.bias is None
        and not module.merged
        and not getattr(module, "fan_in_fan_out", False)
        and not hasattr(down.weight, "ds_id")
    )
    base = module.get_base_layer()
    if not is_plain or (base.bias is not None and base.bias.requires_grad):
        return None
    if _is(module, Linear) and _is(base, torch.nn.Linear):
        frozen = not base.weight.requires_grad and base.weight.dtype == torch.float32
        return (lambda: base.weight) if frozen else None
    return _quantized_weight(base)


def _is(value: object, kind: type) -> bool:
    """Whether it is of a class itself: children of it may compute something else."""
    return type(value) is kind


def _quantized_weight(base: Any) -> Weight | None:
    weight = base.weight
    if type(weight).__name__ != "Params4bit" or base.compute_dtype != torch.float32:
        return None
    from bitsandbytes.functional import dequantize_4bit

    def dense() -> Tensor:
        return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)

    return dense


def _forward_of(module: Any, weight: Weight, adapter: str) -> Any:
    usual = module.forward
    base = module.get_base_layer()
    down, up, scaling = module.lora_A[adapter], module.lora_B[adapter], module.scaling

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        ordinary = arguments or options or module.disable_adapters or x.dtype != torch.float32
        if ordinary or not torch.is_grad_enabled():
            return usual(x, *arguments, **options)
        return lora_linear(x, weight, base.bias, down.weight, up.weight, scaling[adapter])

    return forward


def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> Tensor:
    """x Wᵀ + bias + scaling (x Aᵀ) Bᵀ, where W and bias are frozen.

    Args:
        x: [..., in]
        weight: gives W, [out, in]; asked in the forward and again in the backward pass.
        bias: [out]
        down: A, [rank, in]
        up: B, [out, rank]
        scaling: of the update.
    """
    output: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scaling)
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Any, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        low = linear(rows, down)  # [tokens, rank]
        output = linear(rows, weight(), bias)  # [tokens, out]
        output.addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, low, down, up)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, down, up = ctx.saved_tensors
        gradient = outputs[0].reshape(-1, outputs[0].shape[-1])  # [tokens, out]
        low_gradient = (gradient @ up).mul_(ctx.scaling)  # [tokens, rank]
        down_gradient = low_gradient.T @ rows
        up_gradient = (gradient.T @ low).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = product(gradient, ctx.weight())  # [tokens, in]
            x_gradient.addmm_(low_gradient, down)
            x_gradient = x_gradient.view(ctx.shape)
        return x_gradient, None, None, down_gradient, up_gradient, None
