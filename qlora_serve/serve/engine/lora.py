"""Linear layers that add, to the rows of each adapter, that adapter's low-rank update.

Config → weights → batch view: an `AdapterFiles` becomes `AdapterWeights` (adapters room), which
become a `ResidentAdapter` on the device, and a step sees only rows and residents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_serve.adapters.weights import AdapterWeights
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.attention import StepContext


@dataclass(frozen=True)
class ResidentPair:
    """One layer's update, laid out for the product of rows from the left."""

    a_t: Tensor
    """[in_features, rank]"""
    b_t: Tensor
    """[rank, out_features], already multiplied by the scaling"""


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter on the engine's device. Requests hold it for as long as they run."""

    name: str
    """The name that it was loaded under; only for display."""
    identity: str
    pairs: tuple[ResidentPair | None, ...]
    """By the index of the adapter layer; None where this adapter changes nothing."""
    size_bytes: int


class AdapterLinear(nn.Module):
    """A linear layer of the base, of any quantization, with adapters on top."""

    def __init__(self, base: nn.Module, index: int, context: StepContext, is_output: bool) -> None:
        super().__init__()
        self.base = base
        self.index = index
        self._context = context
        self._is_output = is_output

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, rows, in_features] → [1, rows, out_features]"""
        output: Tensor = self.base(hidden)
        context = self._context
        rows = context.output_rows if self._is_output else context.adapter_rows
        for first, last, adapter in rows:
            pair = adapter.pairs[self.index]
            if pair is not None:
                low = hidden[0, first:last].to(pair.a_t.dtype) @ pair.a_t  # [rows, rank]
                output[0, first:last].addmm_(low.to(output.dtype), pair.b_t)
        return output

    @property
    def weight(self) -> Any:
        """The base layer's weight, for models that look at it."""
        return self.base.weight


class AdapterLayers:
    """The adapter layers of one model."""

    def __init__(self, model: Any, linear_names: list[str], context: StepContext) -> None:
        self._index = {name: index for index, name in enumerate(linear_names)}
        output = model.get_output_embeddings()
        for name, index in self._index.items():
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            base = getattr(parent, child)
            setattr(parent, child, AdapterLinear(base, index, context, base is output))

    def make_resident(
        self, name: str, weights: AdapterWeights, dtype: torch.dtype, device: torch.device
    ) -> ResidentAdapter:
        """Puts an adapter's weights on the device.

        Raises:
            AdapterError: it targets a layer that the engine does not know as linear.
        """
        unknown = sorted(weights.modules.keys() - self._index.keys())
        if unknown:
            raise AdapterError(
                f"adapter {name!r} targets {unknown[0]}, which is not a linear layer of this base"
            )
        pairs: list[ResidentPair | None] = [None] * len(self._index)
        for module, pair in weights.modules.items():
            # Scaled in float32 before rounding to the compute dtype.
            scaled = pair.b.float() * pair.scaling
            pairs[self._index[module]] = ResidentPair(
                a_t=pair.a.to(device, dtype).t().contiguous(),
                b_t=scaled.to(device, dtype).t().contiguous(),
            )
        size = sum(p.a_t.nbytes + p.b_t.nbytes for p in pairs if p is not None)
        return ResidentAdapter(name, weights.identity, tuple(pairs), size)


def linear_names(skeleton: Any) -> list[str]:
    """The paths of a base's linear layers, in the order of the model."""
    return [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]


def rows_by_adapter(
    counts: list[tuple[int, ResidentAdapter | None]],
) -> list[tuple[int, int, ResidentAdapter]]:
    """The flat rows of each adapter, for consecutive chunks of `count` rows.

    Neighbouring chunks of the same adapter share one range, and the base's rows are in none.

    >>> a, b = ResidentAdapter("a", "1", (), 0), ResidentAdapter("b", "2", (), 0)
    >>> [(f, l, x.name) for f, l, x in rows_by_adapter([(2, None), (3, a), (1, a), (1, b)])]
    [(2, 6, 'a'), (6, 7, 'b')]
    """
    ranges: list[tuple[int, int, ResidentAdapter]] = []
    first = 0
    for count, adapter in counts:
        last = first + count
        if adapter is not None:
            if ranges and ranges[-1][2] is adapter and ranges[-1][1] == first:
                ranges[-1] = (ranges[-1][0], last, adapter)
            else:
                ranges.append((first, last, adapter))
        first = last
    return ranges
