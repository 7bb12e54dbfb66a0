"""Attention within rows that lie one after the other in one line.

A line of tokens holds several rows; a token must see the tokens of its own row alone. transformers
makes a mask [tokens, tokens] of the positions that begin anew, and computes every pair that the
mask then throws away. Here each row gets a call of its own instead: nothing is computed twice or
for nothing, and no mask exists. On GPUs FlashAttention does the same in one call, from the same
positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "qlora_serve_rows"

# What models hand to their attention besides queries, keys and values. Anything else that is set
# means an architecture whose attention this is not.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "is_causal", "use_cache", "output_attentions",
     "output_hidden_states", "return_dict", "logits_to_keep", "past_key_values", "head_mask",
     "layer_idx", "position_embeddings"}
)  # fmt: skip

Span = tuple[int, int]
"""The tokens [first, last) of a row in its line."""


def row_spans(position_ids: Tensor) -> list[Span]:
    """The rows of a line, told by the positions that begin anew.

    Args:
        position_ids: [1, tokens]
    """
    starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
    return list(zip(starts, [*starts[1:], position_ids.shape[1]], strict=True))


class RowAttention:
    """Makes a model attend within rows, for as long as `over` lasts."""

    def __init__(self, model: Any) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
        self._layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
        configs = [getattr(module, "config", None) for module in model.modules()]
        held: dict[int, Any] = {id(config): config for config in configs}
        self._configs = [c for c in held.values() if hasattr(c, "_attn_implementation")]

    @contextmanager
    def over(self, position_ids: Tensor) -> Iterator[None]:
        """Attention over the rows of a line; it must also last over the backward pass.

        Args:
            position_ids: [1, tokens]
        """
        spans = row_spans(position_ids)
        before = [config._attn_implementation for config in self._configs]
        for layer in self._layers:
            layer.qlora_serve_spans = spans
        # An implementation that transformers knows no mask for gets none made.
        for config in self._configs:
            config._attn_implementation = _NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
            for layer in self._layers:
                del layer.qlora_serve_spans


def _attention(
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
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'a mask'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    spans: Sequence[Span] = module.qlora_serve_spans
    outputs = [
        _attend(
            query[:, :, first:last],
            key[:, :, first:last],
            value[:, :, first:last],
            scale,
            dropout,
            sliding_window,
            softcap,
        ).transpose(1, 2)
        for first, last in spans
    ]
    return torch.cat(outputs, dim=1), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention within one row; shapes as in `_attention`, of the row's tokens."""
    length = query.shape[2]
    mask = None
    if softcap is not None or (sliding_window is not None and length > sliding_window):
        positions = torch.arange(length, device=query.device)
        distance = positions[:, None] - positions[None, :]
        mask = (distance >= 0) & (distance < (sliding_window or length))  # [tokens, tokens]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    assert mask is not None
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value
