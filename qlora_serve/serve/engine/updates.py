"""One adapter's low-rank update of some rows, by the native kernel."""

import torch
from torch import Tensor

from qlora_serve.serve.engine.kernels.native import AdapterRows, Kernels


def add_update(
    kernels: Kernels, hidden: Tensor, a: Tensor, blocks: Tensor, scale: float, output: Tensor
) -> None:
    """Adds `scale * (hidden @ aᵀ) @ b` to `output`, in place.

    Each row's sums are in the same order for any number of rows, which torch's products do not
    promise.

    Args:
        kernels: of the engine.
        hidden: float32 [rows, in_features]
        a: [rank, in_features] and
        blocks: `b`, both as `pairs.for_kernels` lays them out.
        scale: the request's own.
        output: float32 [rows, out_features], contiguous.
    """
    assert output.is_contiguous()
    hidden = hidden.contiguous()
    rows, rank = hidden.shape[0], a.shape[0]
    group = AdapterRows(0, rows, rank, a.data_ptr(), blocks.data_ptr(), scale)
    low = torch.empty(rows * rank)
    kernels.update(
        hidden.data_ptr(), hidden.shape[1], output.data_ptr(), output.shape[1], group,
        low.data_ptr(),
    )  # fmt: skip
