"""Attention over the engine's own KV cache, plugged into any transformers model.

transformers lets an attention function be registered by name; the model's own forward then calls
it after its projections, norms and rotary embedding. A step's tokens come flat, as one row: the
tokens of every sequence one after the other, so nothing is padded.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_serve.serve.engine.blocks import Copy
from qlora_serve.serve.engine.flash import FlashCache
from qlora_serve.serve.engine.host_memory import ALIGNMENT, huge_pages
from qlora_serve.serve.engine.kernels.native import Kernels, SpanRows
from qlora_serve.serve.engine.large_pages import LARGE_PAGE
from qlora_serve.serve.engine.scheduler import BLOCK_TOKENS

ATTENTION_NAME = "qlora_serve"

# What models hand to their attention function besides queries, keys and values. Anything else
# that is set means an architecture whose attention this is not: refused, never ignored.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "logits_to_keep", "past_key_values", "head_mask",
     "layer_idx", "position_embeddings"}
)  # fmt: skip


@dataclass(frozen=True)
class LayerShape:
    """What one layer's attention asks for, found by running it once."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class KvCache:
    """Keys and values of all layers, in the blocks that the scheduler gives out.

    A layer has one tensor [blocks, 2, kv_heads, BLOCK_TOKENS * head_dim]: a block's keys,
    dimension by dimension as the kernels want them, then its values, token by token. On Linux
    memory that was never written to takes no room.
    """

    def __init__(
        self,
        shapes: dict[int, LayerShape],
        windows: Sequence[int | None],
        blocks: Sequence[int],
    ) -> None:
        self.group = {layer: windows.index(shape.window) for layer, shape in shapes.items()}
        sizes = {
            layer: (blocks[self.group[layer]], 2, shape.kv_heads, BLOCK_TOKENS * shape.head_dim)
            for layer, shape in shapes.items()
        }
        self.layers = _empty(sizes, shapes)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies whole blocks, one after the other: a later one may read what was written."""
        for one in copies:
            for layer, store in self.layers.items():
                if self.group[layer] == one.group:
                    store[one.target] = store[one.source]

    def keys(self, layer: int) -> Tensor:
        """The keys, [blocks, kv_heads, head_dim, BLOCK_TOKENS]."""
        return self.layers[layer][:, 0].unflatten(2, (-1, BLOCK_TOKENS))

    def values(self, layer: int) -> Tensor:
        """The values, [blocks, kv_heads, BLOCK_TOKENS, head_dim]."""
        return self.layers[layer][:, 1].unflatten(2, (BLOCK_TOKENS, -1))

    def write(self, layer: int, span: "Span", keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values [kv_heads, new, head_dim] of a span's tokens."""
        blocks, offsets = span.places(self.group[layer], keys.device)
        self.keys(layer)[blocks, :, :, offsets] = keys.transpose(0, 1)
        self.values(layer)[blocks, :, offsets] = values.transpose(0, 1)

    def read(self, layer: int, span: "Span", window: int | None) -> tuple[Tensor, Tensor, int]:
        """What a span's queries may see, its own tokens included.

        Returns:
            Keys and values [kv_heads, tokens, head_dim], and the position of the first of them.
        """
        first = 0 if window is None else max(0, span.start + 1 - window) // BLOCK_TOKENS
        end = span.start + span.last - span.first
        table = span.index(self.group[layer], self.layers[layer].device)
        table = table[first : -(-end // BLOCK_TOKENS)]
        keys = self.keys(layer)[table].permute(1, 0, 3, 2).flatten(1, 2)
        values = self.values(layer)[table].transpose(0, 1).flatten(1, 2)
        begin = first * BLOCK_TOKENS
        return keys[:, : end - begin], values[:, : end - begin], begin


def _empty(
    sizes: Mapping[int, tuple[int, ...]], shapes: Mapping[int, LayerShape]
) -> dict[int, Tensor]:
    """The memory of each layer.

    The system gives memory by large pages when they are first written to, each of which takes
    milliseconds on a virtual machine. The layers fill up side by side: were all to begin with a
    page, one step in a thousand tokens would wait for a page of every layer (140 ms more with 30
    of them). So each begins at another place within a page.
    """
    if any(shape.device.type != "cpu" for shape in shapes.values()):
        return {
            layer: torch.empty(size, dtype=shapes[layer].dtype, device=shapes[layer].device)
            for layer, size in sizes.items()
        }
    bytes_of = {layer: prod(size) * shapes[layer].dtype.itemsize for layer, size in sizes.items()}
    memory = huge_pages(sum(bytes_of.values()) + (len(sizes) + 1) * LARGE_PAGE)
    layers, end = {}, 0
    for number, (layer, size) in enumerate(sizes.items()):
        place = number * LARGE_PAGE // len(sizes) // ALIGNMENT * ALIGNMENT
        begin = end + (place - end) % LARGE_PAGE
        end = begin + bytes_of[layer]
        layers[layer] = memory[begin:end].view(shapes[layer].dtype).view(size)
    return layers


@dataclass(eq=False)
class Span:
    """The tokens of one sequence in a step's flat row."""

    first: int
    last: int
    """Exclusive."""
    start: int
    """The position of the first of them in its sequence."""
    blocks: Sequence[Sequence[int]]
    """The sequence's blocks, by group."""
    _tensors: dict[int, Tensor] = field(default_factory=dict)
    _places: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def index(self, group: int, device: torch.device) -> Tensor:
        """The blocks of one group, int64 [blocks], made once a step."""
        found = self._tensors.get(group)
        if found is None:
            found = self._tensors[group] = torch.tensor(self.blocks[group], device=device)
        return found

    def places(self, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The block and the place in it of each of the span's tokens, int64 [new] each."""
        found = self._places.get(group)
        if found is None:
            positions = torch.arange(self.start, self.start + self.last - self.first, device=device)
            table = self.index(group, device)
            found = (table[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS)
            self._places[group] = found
        return found


class NativeSpans:
    """The spans of a step as the native kernel reads them: one array a group."""

    def __init__(self, spans: Sequence[Span], groups: int) -> None:
        self.count = len(spans)
        self._tables: list[Any] = []
        self._rows: list[Any] = []
        ends = [span.start + span.last - span.first for span in spans]
        width = max((-(-end // BLOCK_TOKENS) for end in ends), default=0)
        for group in range(groups):
            table = np.zeros((self.count, width), dtype=np.int64)
            rows = (SpanRows * self.count)()
            for number, (row, span) in enumerate(zip(rows, spans, strict=True)):
                blocks = span.blocks[group][:width]
                table[number, : len(blocks)] = blocks
                row.first, row.count, row.start = span.first, span.last - span.first, span.start
                row.table = table.ctypes.data + number * table.strides[0]
            self._tables.append(table)
            self._rows.append(rows)

    def group(self, number: int) -> Any:
        """The spans with the tables of one group."""
        return self._rows[number]

    @property
    def addresses(self) -> list[int]:
        """Where the spans of each group lie."""
        return [ctypes.addressof(rows) for rows in self._rows]


@dataclass
class StepContext:
    """What the layers need to know of the step that is being computed."""

    spans: list[Span] = field(default_factory=list)
    native_spans: NativeSpans | None = None
    """The same for the kernel, where there is one."""
    flash: Any = None
    """The same for flash-attn, where that attends: a `flash.FlashStep`."""
    slots: Any = None
    """The adapters of a step that runs as a graph: a `graphs.GraphSlots`."""
    cache: KvCache | FlashCache | None = None
    """None while `shapes` are being found: each token then sees those before it, and no more."""
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    """What each layer asks for, by its index."""
    adapter_rows: list[tuple[int, int, Any]] = field(default_factory=list)
    """Rows [first, last) of the flat input that belong to an adapter."""
    output_rows: list[tuple[int, int, Any]] = field(default_factory=list)
    """The same for the rows that reach the output embedding."""
    adapter_updates: Any = None
    """`adapter_rows` for the native kernels: a `linear.NativeUpdates`, or None."""
    output_updates: Any = None
    """The same for `output_rows`."""
    kernels: Kernels | None = None
    """The native kernels, where the model computes in float32 on a CPU."""


def attach(model: Any, context: StepContext) -> None:
    """Makes a model's attention layers use the cache of `context`'s sequences."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention)
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)


def attach_context(model: Any, context: StepContext) -> None:
    """Gives every layer of a model the step's context."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.qlora_serve_context = context


def attention(
    module: Any,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,  # [1, kv_heads, tokens, head_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; returns [1, tokens, heads, head_dim]."""
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which the "
            "engine does not apply"
        )
    context: StepContext = module.qlora_serve_context
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = module.layer_idx
    cache = context.cache
    if cache is None:
        context.shapes[layer] = LayerShape(
            key.shape[1], key.shape[3], key.dtype, key.device, sliding_window
        )
        found = attend(query[0], key[0], value[0], 0, scale, sliding_window, softcap)
        return found.transpose(0, 1)[None], None
    if isinstance(cache, FlashCache):
        assert context.flash is not None
        return (
            context.flash.attend(cache, layer, query, key, value, scale, sliding_window, softcap),
            None,
        )
    output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    native = context.native_spans
    if native is not None and query.shape[3] % BLOCK_TOKENS == 0:
        assert context.kernels is not None
        _attend_natively(
            context.kernels, native, cache, layer, query, key, value, output,
            scale, sliding_window or 0, softcap or 0.0,
        )  # fmt: skip
        return output, None
    for span in context.spans:
        rows = slice(span.first, span.last)
        keys, values, begin = key[0, :, rows], value[0, :, rows], 0
        cache.write(layer, span, keys, values)
        if span.start:
            keys, values, begin = cache.read(layer, span, sliding_window)
        output[0, rows] = attend(
            query[0, :, rows], keys, values, span.start - begin, scale, sliding_window, softcap
        ).transpose(0, 1)
    return output, None


def _attend_natively(
    kernels: Kernels,
    spans: NativeSpans,
    cache: KvCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """One call for all sequences; the shapes are those of `attention`."""
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    kernels.attention(
        query.data_ptr(), query.stride(1), query.stride(2),
        key.data_ptr(), key.stride(1), key.stride(2),
        value.data_ptr(), value.stride(1), value.stride(2),
        cache.layers[layer].data_ptr(), output.data_ptr(),
        query.shape[1], key.shape[1], query.shape[3],
        scale, window, softcap, spans.group(cache.group[layer]), spans.count,
    )  # fmt: skip


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of one sequence's new tokens over all its tokens.

    Args:
        query: [heads, new, head_dim], at positions `start` and on.
        keys: [kv_heads, start + new, head_dim]
        values: [kv_heads, start + new, head_dim]
        start: the position of the first query.
        scale: multiplies the scores.
        sliding_window: a query sees this many tokens, itself included; None for all.
        softcap: scores are squeezed to ±softcap by tanh (Gemma 2, arXiv:2408.00118).

    Returns:
        [heads, new, head_dim]
    """
    new = query.shape[1]
    if sliding_window is not None and start + 1 > sliding_window:
        hidden = start + 1 - sliding_window  # no query sees these any more
        keys, values, start = keys[:, hidden:], values[:, hidden:], start - hidden
    is_windowed = sliding_window is not None and start + new > sliding_window
    mask = None
    if new > 1 and (start > 0 or is_windowed or softcap is not None):
        mask = visible(new, start, sliding_window, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            scale=scale,
            enable_gqa=query.shape[0] != keys.shape[0],
        )[0]
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = torch.tanh(query @ keys.transpose(1, 2) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


def visible(new: int, start: int, sliding_window: int | None, device: Any = None) -> Tensor:
    """Which of the `start + new` tokens each of the `new` last ones sees.

    Returns:
        bool [new, start + new]
    """
    positions = torch.arange(start, start + new, device=device)[:, None]
    keys = torch.arange(start + new, device=device)[None, :]
    seen = keys <= positions
    if sliding_window is not None:
        seen &= keys > positions - sliding_window
    return seen
