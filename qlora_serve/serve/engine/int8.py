"""Layers of an int8 base (LLM.int8(), arXiv:2208.07339), each row as if it were alone.

bitsandbytes multiplies inputs of 6 and more in 16 bits and the rest in 8. It looks for them over
the whole batch: a large number in one row takes its column out of the 8 bits of every row, so that
an answer would depend on its company. Here each row has its own large inputs, which is what
bitsandbytes computes for a batch of that one row.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor


def use_rows_of_int8(model: Any) -> None:
    """Lets the int8 layers of a model compute row by row, in place."""
    for module in model.modules():
        # Not `module.weight`, which one in panels puts together.
        if type(module._parameters.get("weight")).__name__ == "Int8Params":
            module.forward = MethodType(_forward, module)


def _forward(layer: Any, hidden: Tensor) -> Tensor:
    """[..., in_features] → [..., out_features]; `layer` is bitsandbytes' Linear8bitLt."""
    weight = layer.weight
    # The first forward pass of bitsandbytes moves both from the weight to the state.
    codes = weight.CB if weight.CB is not None else layer.state.CB  # int8 [out, in]
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB  # [out]
    rows = hidden.reshape(-1, hidden.shape[-1])
    quantized, steps, large = _quantize(rows, layer.state.threshold)
    output = torch.ops.bitsandbytes.int8_scaled_mm(
        quantized, codes, steps, scales, bias=layer.bias, dtype=rows.dtype
    )
    # Column by column: a product over the columns of all rows would sum in another order than one
    # over a row's own, while a number plus zero stays what it is.
    columns = large.any(dim=0).nonzero()[:, 0].tolist()
    if columns:
        apart = rows.masked_fill(~large, 0)
        dense = torch.ops.bitsandbytes.int8_vectorwise_dequant(
            codes[:, columns].contiguous(), scales
        ).to(rows.dtype)  # [out, columns]
        for number, column in enumerate(columns):
            output += apart[:, column, None] * dense[:, number]
    return output.view(*hidden.shape[:-1], -1)


def _quantize(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row in 255 steps of its own, its large inputs left out.

    Returns:
        int8 [rows, in], float32 [rows] of what 127 stands for, and which inputs are left out.
    """
    half = rows.to(torch.float16)  # as bitsandbytes does
    large = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    small = half.masked_fill(large, 0)
    largest = small.abs().amax(dim=1)
    steps = 127.0 / largest.float().clamp(min=2.0**-24)  # the smallest of float16; not 0
    return torch.round(small * steps[:, None]).to(torch.int8), largest.float(), large
