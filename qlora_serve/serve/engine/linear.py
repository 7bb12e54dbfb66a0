"""The base's linear layers, by the fastest kernel for the number of rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.serve.engine.kernels.native import Kernels

# Above this many rows torch's own product is at least as fast (docs/performance.md).
NATIVE_ROWS = 48


class FastLinear(nn.Module):
    """A float32 linear layer on a CPU: own kernel for few rows, torch's for many."""

    def __init__(self, linear: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self.linear_kernel = kernels.linear
        self._weight_pointer = linear.weight.data_ptr()
        self._bias_pointer = None if linear.bias is None else linear.bias.data_ptr()

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, rows, in_features] → [1, rows, out_features]"""
        rows = hidden.shape[-2]
        if rows > NATIVE_ROWS or not hidden.is_contiguous():
            return F.linear(hidden, self.weight, self.bias)
        output = hidden.new_empty(*hidden.shape[:-1], self.out_features)
        self.linear_kernel(
            hidden.data_ptr(), rows, self.in_features, self._weight_pointer, self._bias_pointer,
            output.data_ptr(), self.out_features, None, 0, None,
        )  # fmt: skip
        return output


def use_fast_linears(model: Any, kernels: Kernels) -> None:
    """Replaces a model's float32 linear layers in place; quantized and half ones stay."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
    ]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FastLinear(module, kernels))
