"""Linear layers that add, to the rows of each adapter, that adapter's update.

Config → weights → batch view: an `AdapterFiles` becomes `AdapterWeights` (adapters room), which
become a `ResidentAdapter` on the device, and a step sees only rows, residents and scales.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_serve.adapters.tokens import AdapterTokens
from qlora_serve.adapters.weights import AdapterWeights, LoraPair
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.attention import StepContext
from qlora_serve.serve.engine.dense import dense_weight, dora_gain, require_same
from qlora_serve.serve.engine.embedding import PanelEmbedding, held_weight, width_of
from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.linear import NativeLinear
from qlora_serve.serve.engine.pairs import (
    ResidentPair,
    for_kernels,
    is_stored_plainly,
    laid_out,
    packed,
)
from qlora_serve.serve.engine.replaced import (
    AdapterModule,
    EmbeddingUpdate,
    OwnModule,
    RowFunction,
    own_module,
    wrap,
)
from qlora_serve.serve.engine.slots import ScaledAdapter
from qlora_serve.serve.engine.updates import NATIVE_ROWS


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """An adapter on the engine's device. Its slot keeps it there while requests run with it."""

    name: str
    """The name that it was loaded under; only for display."""
    identity: str
    pairs: tuple[ResidentPair | None, ...]
    """By the index of the adapter layer; None where this adapter changes nothing."""
    size_bytes: int
    own: Mapping[str, RowFunction] = field(default_factory=dict)
    """The path of a module → what computes this adapter's rows in its place."""
    vocabulary: int | None = None
    """The tokens that it knows, where that is more than the base's."""
    tokens: AdapterTokens | None = None
    """Its own tokenizer, where that is another than the base's."""

    @cached_property
    def native_table(self) -> Any:
        """numpy [adapter layers] of `AdapterRows`: rank and addresses of the plain updates.

        Rank 0 where there is none, or where it is not plain and Python applies it.
        """
        table = np.zeros(len(self.pairs), dtype=NATIVE_ROWS)
        for entry, pair in zip(table, self.pairs, strict=True):
            if pair is None or pair.a is None or pair.blocks is None:
                continue
            if pair.is_plain:
                entry["rank"] = pair.a.shape[0]
                entry["a"], entry["b"] = pair.a.data_ptr(), pair.blocks.data_ptr()
        return table

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """See `AdapterSelection.key`."""
        return ((self.identity, 1.0),)

    @property
    def residents(self) -> tuple[ScaledAdapter, ...]:
        """See `AdapterSelection.residents`: an adapter is a selection of itself, unscaled."""
        return (ScaledAdapter(self, 1.0),)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the native table holds all that this adapter does to linear layers."""
        return all(
            pair is None or (pair.is_plain and pair.blocks is not None) for pair in self.pairs
        )


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
        context, base = self._context, self.base
        if context.slots is not None:
            changed: Tensor = context.slots.add(self.index, hidden, base(hidden))
            return changed
        rows = context.output_rows if self._is_output else context.adapter_rows
        updates = None
        output: Tensor
        if isinstance(base, NativeLinear) and base.takes(hidden):
            updates = context.output_updates if self._is_output else context.adapter_updates
            output = base.updated(hidden, updates, self.index)
            if updates is None or not updates.leaves_some:
                return output
        else:
            output = base(hidden)
        for first, last, adapter in rows:
            pair = adapter.resident.pairs[self.index]
            if pair is not None and (updates is None or not pair.is_plain):
                pair.update(
                    output[0, first:last], hidden[0, first:last], adapter.scale, context.kernels
                )
        return output

    @property
    def weight(self) -> Any:
        """The base layer's weight, for models that look at it."""
        return self.base.weight


class AdapterLayers:
    """The adapter layers of one model."""

    def __init__(self, model: Any, linear_names: list[str], context: StepContext) -> None:
        self._model = model
        self._context = context
        self._width = width_of(model.get_input_embeddings())
        self._index = {name: index for index, name in enumerate(linear_names)}
        output = model.get_output_embeddings()
        self._output_name = next((n for n, m in model.named_modules() if m is output), None)
        inside = model.get_input_embeddings()
        self._embeddings = {n for n, m in model.named_modules() if m in (inside, output)}
        for name, index in self._index.items():
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            base = getattr(parent, child)
            setattr(parent, child, AdapterLinear(base, index, context, base is output))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(in_features, out_features) of each layer, by its index."""
        bases = [self._base(name) for name in self._index]
        return [(int(base.in_features), int(base.out_features)) for base in bases]

    def make_resident(
        self, name: str, weights: AdapterWeights, dtype: torch.dtype, device: torch.device
    ) -> ResidentAdapter:
        """Puts an adapter's weights on the device. Other threads may run the model meanwhile.

        Raises:
            AdapterError: it changes a module in a way that the engine does not know, or was
                trained on other base weights than it also holds.
        """
        for module, copied in weights.base_copies.items():
            require_same(name, module, copied, self._base(module))
        pairs: list[ResidentPair | None] = [None] * len(self._index)
        plain = self._stored_plainly(weights, dtype, device)
        changed = weights.modules.keys() | weights.biases.keys()
        for module in changed & self._index.keys() - plain.keys():
            pair, bias = weights.modules.get(module), weights.biases.get(module)
            base = self._base(module)
            update = _resident_pair(base, module, pair, bias, dtype, device)
            if self._context.kernels is not None and update.b_t is not None:
                update = for_kernels(update)
            pairs[self._index[module]] = update
        if device.type == "cpu":
            pairs = packed(pairs)
        if plain and self._context.kernels is not None:
            in_order = sorted(plain, key=self._index.__getitem__)
            by_index = {self._index[module]: plain[module] for module in in_order}
            for index, update in laid_out(by_index, self._context.kernels).items():
                pairs[index] = update
        own = self._own_functions(name, weights, dtype)
        # Nothing can fail from here on, so that a refused adapter leaves the model as it was.
        for module in own:
            wrap(self._model, module, self._context, module == self._output_name)
        size = sum(pair.size_bytes for pair in pairs if pair is not None)
        size += _own_bytes(own.values(), self._model)
        resident = ResidentAdapter(
            name, weights.identity, tuple(pairs), size, own, vocabulary=weights.vocabulary
        )
        _ = resident.native_table  # made here, and not by the thread that decodes
        return resident

    def _stored_plainly(
        self, weights: AdapterWeights, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LoraPair]:
        """The updates of linear layers that can be laid out by one call."""
        if self._context.kernels is None or dtype != torch.float32 or device.type != "cpu":
            return {}
        return {
            module: pair
            for module, pair in weights.modules.items()
            if module in self._index and module not in weights.biases and is_stored_plainly(pair)
        }

    def _own_functions(
        self, name: str, weights: AdapterWeights, dtype: torch.dtype
    ) -> dict[str, RowFunction]:
        """What the adapter does to modules in another way than by a linear layer's update."""
        parts = {module: dict(own) for module, own in weights.replaced.items()}
        with_new_rows: dict[int, Tensor] = {}
        for module in weights.biases.keys() - self._index.keys():
            parts.setdefault(module, {})["bias"] = weights.biases[module]
        for module, tokens in weights.token_rows.items():
            base = self._base(module)
            if getattr(base, "bias", None) is not None:
                raise AdapterError(
                    f"adapter {name!r} trains tokens of {module}, which has a bias; PEFT leaves "
                    "that out, and the engine does not"
                )
            address = held_weight(base).data_ptr()
            if address not in with_new_rows:  # tied modules share one tensor
                weight = base.weight.detach()
                index = torch.tensor(tokens.indices, device=weight.device)
                with_new_rows[address] = weight.index_copy(0, index, tokens.rows.to(weight))
            parts[module] = {"weight": with_new_rows[address]}
        own: dict[str, RowFunction] = {
            module: own_module(
                self._base(module),
                module,
                new,
                self._width,
                self._context,
                weights.vocabulary if module in self._embeddings else None,
            )
            for module, new in parts.items()
        }
        for module in weights.modules.keys() - self._index.keys():
            base = self._base(module)
            if not isinstance(base, nn.Embedding | PanelEmbedding):
                raise AdapterError(
                    f"adapter {name!r} targets {module}, which is neither a linear layer nor an "
                    "embedding of this base"
                )
            own[module] = _embedding_update(
                base, weights.modules[module], dtype, self._context.kernels
            )
        return own

    def _base(self, name: str) -> Any:
        """The base's own module at a path, under whatever the engine put around it."""
        module = self._model.get_submodule(name)
        while isinstance(module, AdapterModule | AdapterLinear):
            module = module.base
        return module


def _resident_pair(
    base: Any,
    name: str,
    pair: LoraPair | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> ResidentPair:
    """Lays out the update of one linear layer. All is computed in float32, and rounded last."""
    old = getattr(base, "bias", None)
    if bias is not None and old is None:
        raise AdapterError(f"the adapter brings a bias for {name}, which has none in this base")
    gain = offset = a = b_t = None
    if pair is not None:
        b = pair.b.to(device, torch.float32) * pair.scaling
        if pair.magnitude is not None:
            gain = dora_gain(dense_weight(base, name), pair)
            b = b * gain[:, None]
        a = pair.a.to(device, dtype).contiguous()
        b_t = b.to(dtype).t().contiguous()
        if pair.b_bias is not None:
            offset = pair.b_bias.to(device, torch.float32) * pair.scaling
    if old is not None and (gain is not None or bias is not None):
        # The base's output holds its bias, times the gain by now: out with it, in with the new.
        held = old.detach().float()
        new = held if bias is None else bias.to(device, torch.float32)
        change = new - (held if gain is None else held * gain)
        offset = change if offset is None else offset + change
    return ResidentPair(a, b_t, gain, offset)


def _embedding_update(
    base: Any, pair: LoraPair, dtype: torch.dtype, kernels: Kernels | None
) -> EmbeddingUpdate:
    """Lays out the update of an embedding, whose effective weight is [hidden, vocabulary]."""
    device = held_weight(base).device
    b = pair.b.to(device, torch.float32) * pair.scaling
    gain = None
    if pair.magnitude is not None:
        gain = dora_gain(base.weight.detach().float().t(), pair)
        b = b * gain[:, None]
    # Gemma's embeddings are multiplied by the root of the width, after the look-up.
    b = b * float(getattr(base, "embed_scale", 1.0))
    a_t, b_t = pair.a.to(device, dtype).t().contiguous(), b.to(dtype).t().contiguous()
    if kernels is None:
        return EmbeddingUpdate(a_t, b_t, gain)
    # What is looked up is the low-rank product already.
    unit = for_kernels(ResidentPair(torch.eye(b_t.shape[0]), b_t))
    return EmbeddingUpdate(a_t, None, gain, kernels, unit.a, unit.blocks)


def _own_bytes(functions: Iterable[RowFunction], base: Any) -> int:
    """Bytes that these hold and the base does not; a tensor that two share counts once."""
    held: dict[int, int] = {}
    for function in functions:
        if isinstance(function, OwnModule):
            tensors: list[Tensor] = list(function.module.parameters())
        else:
            assert isinstance(function, EmbeddingUpdate)
            parts = (function.a_t, function.b_t, function.gain, function.unit, function.blocks)
            tensors = [part for part in parts if part is not None]
        held |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    if not held:
        return 0
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    return sum(size for pointer, size in held.items() if pointer not in shared)


def linear_names(skeleton: Any) -> list[str]:
    """The paths of a base's linear layers, in the order of the model."""
    return [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]


def rows_by_adapter(counts: list[tuple[int, Any]]) -> list[tuple[int, int, ScaledAdapter]]:
    """The flat rows of each adapter, for consecutive chunks of `count` rows.

    Neighbouring chunks of the same selection share one range, the base's rows are in none, and
    those of a composition are in one for each of its adapters.

    Args:
        counts: rows, and an `AdapterSelection` (a `ResidentAdapter` alone is one as well), or None
            for the base.

    >>> a, b = ResidentAdapter("a", "1", (), 0), ResidentAdapter("b", "2", (), 0)
    >>> rows = rows_by_adapter([(2, None), (3, a), (1, a), (1, b)])
    >>> [(first, last, it.resident.name) for first, last, it in rows]
    [(2, 6, 'a'), (6, 7, 'b')]
    """
    ranges: list[tuple[int, int, Any]] = []
    first = 0
    for count, selection in counts:
        last = first + count
        if selection is not None:
            if ranges and ranges[-1][1] == first and ranges[-1][2].key == selection.key:
                ranges[-1] = (ranges[-1][0], last, ranges[-1][2])
            else:
                ranges.append((first, last, selection))
        first = last
    return [(first, last, one) for first, last, them in ranges for one in them.residents]
