"""Low-rank updates by the native kernels: of one adapter's rows, and of all rows of a step."""

import ctypes
import weakref
from typing import Any

import numpy as np
from torch import Tensor

from qlora_serve.serve.engine.kernels.native import AdapterRows, Kernels
from qlora_serve.serve.engine.linear import NativeUpdates
from qlora_serve.serve.engine.slots import ScaledAdapter

# numpy's view of updates.h's AdapterRows, to fill the groups of all layers at once.
NATIVE_ROWS = np.dtype(AdapterRows)


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
    kernels.update(
        hidden.data_ptr(), hidden.shape[1], output.data_ptr(), output.shape[1], ctypes.byref(group)
    )


def native_updates(rows: list[tuple[int, int, ScaledAdapter]]) -> NativeUpdates | None:
    """The step's plain updates for the kernels; None when no row has an adapter."""
    if not rows:
        return None
    # [layers, groups], so that a layer's groups lie side by side. The dtype is given because numpy
    # would leave out the padding at a structure's end.
    tables = [adapter.resident.native_table for *_, adapter in rows]
    groups = np.stack(tables, axis=1, dtype=NATIVE_ROWS)
    groups["first"] = [first for first, *_ in rows]
    groups["last"] = [last for _, last, _ in rows]
    groups["scale"] = [adapter.scale for *_, adapter in rows]
    return NativeUpdates(
        groups=groups.ctypes.data,
        count=len(rows),
        stride=groups.strides[0],
        leaves_some=not all(adapter.resident.is_plain for *_, adapter in rows),
        keep=groups,
    )


class UpdatesInTurn:
    """The `native_updates` of one step after another: the same while the rows are the same.

    Kept without keeping an adapter from leaving the memory.
    """

    def __init__(self) -> None:
        self._last: list[tuple[int, int, weakref.ref[Any], float]] = []
        self._updates: NativeUpdates | None = None

    def of(self, rows: list[tuple[int, int, ScaledAdapter]]) -> NativeUpdates | None:
        """See `native_updates`."""
        same = len(rows) == len(self._last) and all(
            (first, last, adapter.scale) == (one, other, scale) and adapter.resident is found()
            for (first, last, adapter), (one, other, found, scale) in zip(
                rows, self._last, strict=True
            )
        )
        if not same:
            self._updates = native_updates(rows)
            self._last = [
                (first, last, weakref.ref(adapter.resident), adapter.scale)
                for first, last, adapter in rows
            ]
        return self._updates
