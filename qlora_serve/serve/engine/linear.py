"""The base's linear layers, by the fastest kernel for the number of rows."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.serve.engine.gptq import PackedGptq, pack_gptq
from qlora_serve.serve.engine.kernels.native import Kernels, are_forced

# Above this many rows torch's own product is at least as fast (docs/performance.md).
NATIVE_ROWS = 48

_NF4_BLOCK = 64
_PANEL = 32  # outputs; kernels.cpp has the same number
_TRIAL_ROWS = 8
_TRIALS = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeUpdates:
    """The plain LoRA updates of one step's rows, as the kernels read them."""

    groups: int
    """Address of the first layer's `AdapterRows`."""
    count: int
    """Groups of a layer."""
    stride: int
    """Bytes from one layer's groups to the next's."""
    low: Tensor
    """Scratch for the low-rank products of one layer."""
    leaves_some: bool
    """Whether an adapter has updates that are not plain, which are left to Python."""
    keep: Any
    """What `groups` points into."""


class NativeLinear(nn.Module):
    """A float32-computing linear layer on a CPU: own kernel for few rows, torch's for many."""

    in_features: int
    out_features: int
    bias: Any

    def takes(self, hidden: Tensor) -> bool:
        """Whether the kernel is meant for this input [1, rows, in_features]."""
        return hidden.shape[-2] <= NATIVE_ROWS and hidden.is_contiguous()

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, rows, in_features] → [1, rows, out_features]"""
        return self.updated(hidden, None, 0) if self.takes(hidden) else self.by_torch(hidden)

    def updated(self, hidden: Tensor, updates: NativeUpdates | None, index: int) -> Tensor:
        """The layer's output with the adapters' updates of the layer called `index` added.

        Args:
            hidden: [1, rows, in_features] that the layer `takes`.
            updates: of the step's rows, if any.
            index: which of their layers this is.
        """
        output = hidden.new_empty(*hidden.shape[:-1], self.out_features)
        if updates is None:
            self.call_kernel(hidden, output, None, 0, None)
        else:
            groups = updates.groups + index * updates.stride
            self.call_kernel(hidden, output, groups, updates.count, updates.low.data_ptr())
        return output

    def by_torch(self, hidden: Tensor) -> Tensor:
        """The same without the kernel."""
        raise NotImplementedError

    def call_kernel(
        self, hidden: Tensor, output: Tensor, groups: int | None, count: int, low: int | None
    ) -> None:
        """Fills `output`."""
        raise NotImplementedError


class FastLinear(NativeLinear):
    """Float32 weights."""

    def __init__(self, linear: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self._kernel = kernels.linear
        self._pointers = (linear.weight.data_ptr(), _pointer(linear.bias))

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`."""
        return F.linear(hidden, self.weight, self.bias)

    def call_kernel(
        self, hidden: Tensor, output: Tensor, groups: int | None, count: int, low: int | None
    ) -> None:
        """See `NativeLinear`."""
        weight, bias = self._pointers
        self._kernel(
            hidden.data_ptr(), hidden.shape[-2], self.in_features, weight, bias,
            output.data_ptr(), self.out_features, groups, count, low,
        )  # fmt: skip


class PanelLinear(NativeLinear):
    """Float32 weights, rearranged into panels: the kernel for any number of rows."""

    def __init__(self, linear: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self._panels = to_panels(linear.weight.detach())
        self._kernel = kernels.linear_panels
        self._pointers = (self._panels.data_ptr(), _pointer(linear.bias))

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], put together anew."""
        return from_panels(self._panels, self.out_features)

    def takes(self, hidden: Tensor) -> bool:
        """See `NativeLinear`."""
        return hidden.is_contiguous()

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`."""
        return F.linear(hidden, self.weight, self.bias)

    def call_kernel(
        self, hidden: Tensor, output: Tensor, groups: int | None, count: int, low: int | None
    ) -> None:
        """See `NativeLinear`."""
        weight, bias = self._pointers
        self._kernel(
            hidden.data_ptr(), hidden.shape[-2], self.in_features, weight, bias,
            output.data_ptr(), self.out_features, groups, count, low,
        )  # fmt: skip


class FastNf4Linear(NativeLinear):
    """NF4 weights of bitsandbytes, unpacked in registers while they are multiplied."""

    def __init__(self, linear: Any, kernels: Kernels) -> None:
        super().__init__()
        self.base = linear
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.out_features, self.in_features = linear.weight.quant_state.shape
        self._kernel = kernels.linear_nf4
        self._codes = linear.weight.data
        self._scales = _nf4_scales(linear.weight.quant_state)
        self._table = linear.weight.quant_state.code.float().contiguous()
        self._pointers = tuple(map(_pointer, (self._codes, self._scales, self._table, self.bias)))

    @property
    def weight(self) -> Any:
        """The packed weight."""
        return self.base.weight

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`; dequantizes the layer once for all rows."""
        output: Tensor = self.base(hidden)
        return output

    def call_kernel(
        self, hidden: Tensor, output: Tensor, groups: int | None, count: int, low: int | None
    ) -> None:
        """See `NativeLinear`."""
        self._kernel(
            hidden.data_ptr(), hidden.shape[-2], self.in_features, *self._pointers,
            output.data_ptr(), self.out_features, groups, count, low,
        )  # fmt: skip


class FastGptqLinear(NativeLinear):
    """GPTQ weights of 2, 4 or 8 bits, unpacked in registers while they are multiplied."""

    def __init__(self, linear: Any, packed: PackedGptq, kernels: Kernels) -> None:
        super().__init__()
        self.base = linear
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._kernels = kernels
        self._packed = packed
        self._layout = (
            packed.bits, packed.codes.data_ptr(), packed.groups.data_ptr(),
            packed.groups.shape[1], packed.shift,
        )  # fmt: skip

    @property
    def weight(self) -> Any:
        """What gptqmodel shows of the packed weight."""
        return self.base.weight

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`; dequantizes the layer once for all rows."""
        if hidden.dtype != torch.float32:
            output: Tensor = self.base(hidden)
            return output
        weight = hidden.new_empty(self.out_features, self.in_features)
        bits, *layout = self._layout
        self._kernels.dequantize_gptq(
            self.in_features, bits, *layout, weight.data_ptr(), self.out_features
        )
        return F.linear(self._ordered(hidden), weight, self.bias)

    def call_kernel(
        self, hidden: Tensor, output: Tensor, groups: int | None, count: int, low: int | None
    ) -> None:
        """See `NativeLinear`."""
        ordered = self._ordered(hidden)
        self._kernels.linear_gptq(
            ordered.data_ptr(), hidden.data_ptr(), hidden.shape[-2], self.in_features,
            *self._layout, _pointer(self.bias), output.data_ptr(), self.out_features,
            groups, count, low,
        )  # fmt: skip

    def _ordered(self, hidden: Tensor) -> Tensor:
        """Inputs in the order of the groups."""
        order = self._packed.order
        return hidden if order is None else hidden.index_select(-1, order)


def to_panels(weight: Tensor) -> Tensor:
    """[out_features, in_features] → [out_features / 32 rounded up, in_features, 32]."""
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, 0, 0, -out_features % _PANEL))
    return padded.view(-1, _PANEL, in_features).transpose(1, 2).contiguous()


def from_panels(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of `to_panels`."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features]


def use_fast_linears(model: Any, kernels: Kernels) -> None:
    """Replaces a model's float32, NF4 and GPTQ layers in place; others stay as they are.

    Those of a kind stay where a short trial shows that torch's own product is faster.
    """
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings().weight
    chosen: dict[type, bool] = {}
    for name in list(modules):
        # Taken out, so that the weights of one layer at a time are held twice.
        fast = _fast_layer(modules.pop(name), embedding, kernels)
        if fast is None:
            continue
        kind = type(fast)
        if kind not in chosen:
            chosen[kind] = (
                are_forced() or kind in (FastNf4Linear, FastGptqLinear) or _is_faster(fast)
            )
            if not chosen[kind]:
                log.info("torch's own product is faster here than the native %s", kind.__name__)
        if chosen[kind]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fast)


def _fast_layer(module: Any, embedding: Tensor, kernels: Kernels) -> NativeLinear | None:
    if _is_nf4(module):
        return FastNf4Linear(module, kernels)
    packed = pack_gptq(module)
    if packed is not None:
        return FastGptqLinear(module, packed, kernels)
    if not _is_plain(module):
        return None
    # A weight that the input embedding shares must stay as it is: rows are looked up in it.
    is_shared = module.weight is embedding or module.weight.data_ptr() == embedding.data_ptr()
    return FastLinear(module, kernels) if is_shared else PanelLinear(module, kernels)


def _is_faster(layer: NativeLinear) -> bool:
    """Whether the kernel beats torch on a batch of eight rows."""
    hidden = torch.randn(1, _TRIAL_ROWS, layer.in_features)
    weight: Any = layer.weight  # of panels it is put together anew each time

    def shortest(product: Callable[[Tensor], Tensor]) -> float:
        times = []
        for _ in range(_TRIALS):
            start = time.perf_counter()
            product(hidden)
            times.append(time.perf_counter() - start)
        return min(times)  # the least disturbed

    with torch.inference_mode():
        by_kernel = shortest(layer)
        by_torch = shortest(lambda rows: F.linear(rows, weight, layer.bias))
    # Near a tie the kernel stays: it adds the adapters' updates in the same sweep.
    return by_kernel < 1.25 * by_torch


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and _is_ready(module.weight, torch.float32)


def _is_nf4(module: Any) -> bool:
    """Whether a layer is NF4 in the layout that the kernel reads."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ != "Params4bit" or not _is_ready(weight, torch.uint8):
        return False
    state = weight.quant_state
    return bool(
        state.quant_type == "nf4"
        and state.blocksize == _NF4_BLOCK
        and state.dtype == torch.float32
        and state.shape[1] % _NF4_BLOCK == 0
        and module.compute_dtype in (None, torch.float32)
        and not getattr(state, "packing_format_for_cpu", False)
    )


def _is_ready(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous()


def _nf4_scales(state: Any) -> Tensor:
    """The scale of each block of 64 weights, float32; themselves unpacked if they are quantized."""
    if not state.nested:
        return state.absmax.float().contiguous()
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
