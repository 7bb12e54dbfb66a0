"""What flash-attn's paged functions compute, in plain torch: for tests on any device."""

from typing import Any

import torch
from torch import Tensor

from qlora_serve.serve.engine.flash import FlashFunctions


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` (version 2.8) with a block table.

    Args:
        q: [all new tokens, heads, head_dim]
        k: [blocks, page, kv_heads, head_dim]
        v: [blocks, page, kv_heads, head_dim]
        cu_seqlens_q: int32 [sequences + 1], where each sequence's new tokens begin.
        cu_seqlens_k: int32 [sequences + 1], the running sum of the sequences' lengths.
        max_seqlen_q: the most new tokens of a sequence.
        max_seqlen_k: the longest sequence.
        dropout_p: 0 only.
        softmax_scale: multiplies the scores.
        causal: a token sees itself and what is before it; the last new token is the sequence's
            last.
        window_size: how many tokens to the left and to the right are seen; -1 for all.
        softcap: scores are squeezed to ±softcap; 0 for not at all.
        alibi_slopes: None only.
        deterministic: of the backward pass.
        return_attn_probs: False only.
        block_table: int32 [sequences, blocks], the sequence's blocks.

    Returns:
        [all new tokens, heads, head_dim]
    """
    assert dropout_p == 0
    assert alibi_slopes is None
    assert not return_attn_probs
    assert block_table is not None
    page = k.shape[1]
    assert page % 256 == 0, "flash-attn refuses other pages"
    assert {t.dtype for t in (cu_seqlens_q, cu_seqlens_k, block_table)} == {torch.int32}
    counts, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(counts), max(lengths)) == (max_seqlen_q, max_seqlen_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs, first = [], 0
    for count, length, blocks in zip(counts, lengths, block_table.tolist(), strict=True):
        own = blocks[: -(-length // page)]
        keys, values = (store[own].flatten(0, 1)[:length].float() for store in (k, v))
        groups = q.shape[1] // k.shape[2]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first : first + count].float(), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(length - count, length, device=q.device)[:, None]
        other = torch.arange(length, device=q.device)[None]
        left, right = window_size
        seen = torch.ones(count, length, dtype=torch.bool, device=q.device)
        if causal:
            seen &= other <= place
        if left >= 0:
            seen &= other >= place - left
        if right >= 0:
            seen &= other <= place + right
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        # A page that nobody may see can hold anything, NaN too, and 0 times that is NaN.
        values = torch.where(seen.any(0)[:, None, None], values, 0.0)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
        first += count
    return torch.cat(outputs)


def with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """`flash_attn.flash_attn_with_kvcache` (version 2.8), with the arguments that are used here.

    Args:
        q: [sequences, 1, heads, head_dim]
        k_cache: [blocks, page, kv_heads, head_dim], the new token's key included.
        v_cache: the same of the values.
        cache_seqlens: int32 [sequences], the sequences' lengths.
        block_table: int32 [sequences, blocks], the sequence's blocks.
        softmax_scale: see `varlen`, as of what follows.
        causal: whether a token sees only itself and what is before it.
        window_size: how many tokens to the left and to the right are seen.
        softcap: scores are squeezed to ±softcap.

    Returns:
        [sequences, 1, heads, head_dim]
    """
    assert q.shape[1] == 1
    count, longest = len(q), int(cache_seqlens.max())
    zero = cache_seqlens.new_zeros(1)
    return varlen(
        q[:, 0],
        k_cache,
        v_cache,
        torch.arange(count + 1, dtype=torch.int32, device=q.device),
        torch.cat([zero, cache_seqlens]).cumsum(0, dtype=torch.int32),
        1,
        longest,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        block_table=block_table,
    )[:, None]


REFERENCE = FlashFunctions(varlen, with_cache)
