"""Attention over the engine's own KV cache, plugged into any transformers model.

transformers lets an attention function be registered by name; the model's own forward then calls
it after its projections, norms and rotary embedding. A step's tokens come flat, as one row: the
tokens of every sequence one after the other, so nothing is padded.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_serve.serve.engine.kernels.native import DecodeRow, Kernels

ATTENTION_NAME = "qlora_serve"
_GROWTH = 128  # tokens; a cache grows by at least this much, so that few steps copy

# What models hand to their attention function besides queries, keys and values. Anything else
# that is set means an architecture whose attention this is not: refused, never ignored.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "logits_to_keep", "past_key_values", "head_mask",
     "layer_idx", "position_embeddings"}
)  # fmt: skip


class SequenceCache:
    """Keys and values of one sequence, a contiguous tensor a layer that grows when it must."""

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new tokens from position `start`, and returns all keys and values up to them.

        Args:
            layer: the layer's index.
            start: the position of the first new token.
            keys: [kv_heads, new, head_dim]
            values: [kv_heads, new, head_dim]

        Returns:
            Views of [kv_heads, start + new, head_dim] each.
        """
        end = start + keys.shape[1]
        store = self.room(layer, end, keys)
        store[0, :, start:end] = keys
        store[1, :, start:end] = values
        return store[0, :, :end], store[1, :, :end]

    def room(self, layer: int, end: int, like: Tensor) -> Tensor:
        """The store [2, kv_heads, capacity, head_dim] of a layer, grown to hold `end` tokens.

        Args:
            layer: the layer's index.
            end: tokens that must fit.
            like: [kv_heads, any, head_dim], for shape, dtype and device.
        """
        store = self._layers.get(layer)
        if store is None or store.shape[2] < end:
            store = self._grow(layer, store, end, like)
        return store

    def _grow(self, layer: int, old: Tensor | None, end: int, like: Tensor) -> Tensor:
        held = 0 if old is None else old.shape[2]
        capacity = max(end, held * 3 // 2)
        capacity = (capacity + _GROWTH - 1) // _GROWTH * _GROWTH
        new = like.new_empty(2, like.shape[0], capacity, like.shape[2])
        if old is not None:
            new[:, :, :held] = old
        self._layers[layer] = new
        return new


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a step's flat row."""

    first: int
    last: int
    """Exclusive."""
    start: int
    """The position of the first of them in its sequence."""
    cache: SequenceCache


@dataclass
class StepContext:
    """What the layers need to know of the step that is being computed."""

    spans: list[Span] = field(default_factory=list)
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
    output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    spans = context.spans
    if context.kernels is not None and query.stride(3) == key.stride(3) == value.stride(3) == 1:
        decoding = [span for span in spans if span.last - span.first == 1]
        spans = [span for span in spans if span.last - span.first > 1]
        if decoding:
            _attend_decoding(
                context.kernels, module.layer_idx, decoding, query, key, value, output,
                scale, sliding_window or 0, softcap or 0.0,
            )  # fmt: skip
    for span in spans:
        rows = slice(span.first, span.last)
        keys, values = span.cache.write(
            module.layer_idx, span.start, key[0, :, rows], value[0, :, rows]
        )
        output[0, rows] = attend(
            query[0, :, rows], keys, values, span.start, scale, sliding_window, softcap
        ).transpose(0, 1)
    return output, None


def _attend_decoding(
    kernels: Kernels,
    layer: int,
    spans: list[Span],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """One call for every sequence that decodes; the shapes are those of `attention`."""
    rows = (DecodeRow * len(spans))()
    for row, span in zip(rows, spans, strict=True):
        store = span.cache.room(layer, span.start + 1, key[0])
        row.row, row.position = span.first, span.start
        row.cache, row.capacity = store.data_ptr(), store.shape[2]
    kernels.decode_attention(
        query.data_ptr(), query.stride(1), query.stride(2),
        key.data_ptr(), key.stride(1), key.stride(2),
        value.data_ptr(), value.stride(1), value.stride(2),
        output.data_ptr(), query.shape[1], key.shape[1], query.shape[3],
        scale, window, softcap, rows, len(spans),
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
