"""The base's linear layers, by the fastest kernel there is."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.serve.engine.coded import (
    PANEL,
    CodedWeights,
    code_gptq,
    code_nf4,
    from_panels,
)
from qlora_serve.serve.engine.embedding import PanelEmbedding, can_look_up
from qlora_serve.serve.engine.host_memory import Arena
from qlora_serve.serve.engine.kernels.native import Kernels, are_forced

_TRIAL_ROWS = 8
_TRIALS = 20
_LEAST_TRIALS = 3
_TRIAL_SECONDS = 0.05  # a server that starts waits for it

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
    leaves_some: bool
    """Whether an adapter has updates that are not plain, which are left to Python."""
    keep: Any
    """What `groups` points into."""


class NativeLinear(nn.Module):
    """A float32-computing linear layer on a CPU, by an own kernel."""

    in_features: int
    out_features: int
    bias: Any

    def takes(self, hidden: Tensor) -> bool:
        """Whether the kernel can compute this input [1, rows, in_features].

        For any number of rows: torch's products sum in another order for another number of them.
        """
        return hidden.is_contiguous()

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
            self.call_kernel(hidden, output, None, 0)
        else:
            groups = updates.groups + index * updates.stride
            self.call_kernel(hidden, output, groups, updates.count)
        return output

    def by_torch(self, hidden: Tensor) -> Tensor:
        """The same without the kernel."""
        raise NotImplementedError

    def call_kernel(self, hidden: Tensor, output: Tensor, groups: int | None, count: int) -> None:
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
        # The addresses are asked for anew each time: a model's weights may yet move.
        self._tensors = (linear.weight, linear.bias)

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`."""
        return F.linear(hidden, self.weight, self.bias)

    def call_kernel(self, hidden: Tensor, output: Tensor, groups: int | None, count: int) -> None:
        """See `NativeLinear`."""
        weight, bias = self._tensors
        self._kernel(
            hidden.data_ptr(), hidden.shape[-2], self.in_features, weight.data_ptr(),
            _pointer(bias), output.data_ptr(), self.out_features, groups, count,
        )  # fmt: skip


class PanelLinear(NativeLinear):
    """Float32 weights, rearranged into panels: the kernel for any number of rows."""

    def __init__(self, linear: nn.Linear, kernels: Kernels, arena: Arena | None = None) -> None:
        super().__init__()
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape
        shape = (-(-self.out_features // PANEL), self.in_features, PANEL)
        self.panels = torch.empty(shape) if arena is None else arena.empty(*shape)
        weight = linear.weight.detach()  # contiguous: `_is_plain` looks
        kernels.to_panels(
            weight.data_ptr(), self.out_features, self.in_features, self.panels.data_ptr()
        )
        self._kernel = kernels.linear_panels
        self._tensors = (self.panels, linear.bias)

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features], put together anew."""
        return from_panels(self.panels, self.out_features)

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`."""
        return F.linear(hidden, self.weight, self.bias)

    def call_kernel(self, hidden: Tensor, output: Tensor, groups: int | None, count: int) -> None:
        """See `NativeLinear`."""
        weight, bias = self._tensors
        self._kernel(
            hidden.data_ptr(), hidden.shape[-2], self.in_features, weight.data_ptr(),
            _pointer(bias), output.data_ptr(), self.out_features, groups, count,
        )  # fmt: skip


class CodedLinear(NativeLinear):
    """NF4 or GPTQ weights, decoded in registers while they are multiplied.

    Only their own layout is kept, so that nothing is held twice.
    """

    def __init__(self, weights: CodedWeights, bias: Tensor | None, kernels: Kernels) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.detach().float().clone()
        self.in_features, self.out_features = weights.in_features, weights.out_features
        self._weights = weights
        self._kernels = kernels
        self._kernel = kernels.linear_coded
        self._layout = (
            weights.bits,
            *map(_pointer, (weights.codes, weights.scales, weights.offsets, weights.table)),
            weights.scales.shape[1],
            weights.shift,
        )

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features] in float32, decoded anew."""
        weights = self._weights
        panels = torch.empty(weights.codes.shape[0], self.in_features, PANEL)
        self._kernels.decode_panels(
            self.in_features, *self._layout, panels.data_ptr(), panels.shape[0]
        )
        dense = from_panels(panels, self.out_features)
        return dense if weights.order is None else dense[:, torch.argsort(weights.order)]

    def takes(self, hidden: Tensor) -> bool:
        """See `NativeLinear`."""
        return hidden.is_contiguous() and hidden.dtype == torch.float32

    def by_torch(self, hidden: Tensor) -> Tensor:
        """See `NativeLinear`; decodes the layer once for all rows."""
        return F.linear(hidden.float(), self.weight, self.bias)

    def call_kernel(self, hidden: Tensor, output: Tensor, groups: int | None, count: int) -> None:
        """See `NativeLinear`."""
        order = self._weights.order
        ordered = hidden if order is None else hidden.index_select(-1, order)
        self._kernel(
            ordered.data_ptr(), hidden.data_ptr(), hidden.shape[-2], self.in_features,
            *self._layout, _pointer(self.bias), output.data_ptr(), self.out_features,
            groups, count,
        )  # fmt: skip


def use_fast_linears(model: Any, kernels: Kernels, arena: Arena | None = None) -> None:
    """Replaces a model's float32, NF4 and GPTQ layers in place; others stay as they are.

    Those of a kind stay where a short trial shows that torch's own product is faster.

    Args:
        model: in which they are replaced.
        kernels: that compute them.
        arena: the memory for their weights; None for torch's own.
    """
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings()
    sharing = {name for name, one in modules.items() if _share(one, embedding)}
    # Two modules and no third: both can then have the weight in panels.
    is_pair = len(sharing) == 2 and can_look_up(embedding)
    chosen: dict[type, bool] = {}
    for name in list(modules):
        # Taken out, so that the weights of one layer at a time are held twice.
        module = modules.pop(name)
        stays = name in sharing and not is_pair
        fast = _fast_layer(module, stays, kernels, arena)
        if fast is None:
            continue
        kind = type(fast)
        if kind not in chosen:
            chosen[kind] = are_forced() or kind is CodedLinear or _is_faster(fast, module.weight)
            if not chosen[kind]:
                log.info("torch's own product is faster here than the native %s", kind.__name__)
        if not chosen[kind]:
            continue
        _put(model, name, fast)
        if isinstance(fast, PanelLinear) and name in sharing:
            (other,) = sharing - {name}
            _put(model, other, PanelEmbedding(embedding, fast.panels, kernels))


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _share(module: Any, embedding: Any) -> bool:
    """Whether a module has the weight of the input embedding, as that itself does."""
    own: Any = module._parameters.get("weight")
    shared = embedding.weight
    return own is not None and own.data_ptr() == shared.data_ptr() and own.shape == shared.shape


def _fast_layer(
    module: Any, stays: bool, kernels: Kernels, arena: Arena | None
) -> NativeLinear | None:
    """What takes a layer's place, if anything does; `stays`: its weight must not be rearranged."""
    coded = code_nf4(module, arena) or code_gptq(module, arena)
    if coded is not None:
        return CodedLinear(coded, module.bias, kernels)
    if not _is_plain(module):
        return None
    return FastLinear(module, kernels) if stays else PanelLinear(module, kernels, arena)


def _is_faster(layer: NativeLinear, weight: Tensor) -> bool:
    """Whether the kernel beats torch, with this weight, on a batch of eight rows."""
    hidden = torch.randn(1, _TRIAL_ROWS, layer.in_features)

    ways: list[Callable[[], Tensor]] = [
        lambda: layer(hidden),
        lambda: F.linear(hidden, weight, layer.bias),
    ]
    least = [math.inf, math.inf]  # the least disturbed time of each
    with torch.inference_mode():
        begun = time.perf_counter()
        for trial in range(_TRIALS):  # in turns, so that a busy moment falls on both
            if trial >= _LEAST_TRIALS and time.perf_counter() - begun > _TRIAL_SECONDS:
                break
            for number, product in enumerate(ways):
                start = time.perf_counter()
                product()
                least[number] = min(least[number], time.perf_counter() - start)
    by_kernel, by_torch = least
    # Where the kernel is wrong for a processor it takes several times as long. Anything less may be
    # a disturbance, and the kernel also adds the adapters' updates in the same sweep.
    return by_kernel < 2 * by_torch


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and _is_ready(module.weight, torch.float32)


def _is_ready(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
