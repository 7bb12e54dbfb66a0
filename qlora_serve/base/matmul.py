"""Products of float32 matrices on a CPU, by oneDNN.

torch leaves them to MKL, which does not use the whole width of processors that are not Intel's: on
an AMD EPYC with AVX-512 it reaches 100 GFLOP/s a core, and oneDNN, which comes with torch too, 180
to 240. torch calls oneDNN for float32 only behind an operator of its compiler; it takes ordinary
tensors in any order of rows and columns, so that nothing is packed or kept.
"""

import platform
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_X86 = ("x86_64", "amd64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, without a gradient of its own.

    Args:
        x: [rows, in]
        weight: [out, in], contiguous or the transpose of something contiguous.
        bias: [out]

    Returns:
        [rows, out]
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not plain or x.numel() == 0 or not _has_onednn():
        return functional.linear(x, weight, bias)
    # The names of what follows the product: nothing.
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x M, as `linear`; x [rows, in], M [in, out]."""
    return linear(x, matrix.T)


@cache
def _has_onednn() -> bool:
    """Whether the operator is there, on a processor for which it is the better choice."""
    return (
        platform.machine().lower() in _X86
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
