"""Attention by flash-attn (arXiv:2307.08691) on a GPU, straight from the paged cache.

Not measured on a GPU yet. The tests run all of it on a CPU, with `flash_reference` in the place of
flash-attn's functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlora_serve.errors import ConfigError
from qlora_serve.serve.engine.blocks import Copy

PAGE_TOKENS = 256
"""Tokens of a block: flash-attn 2 reads paged caches of multiples of this only."""
_MOST_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FlashFunctions:
    """flash-attn's functions, or what stands in for them."""

    varlen: Callable[..., Tensor]
    """`flash_attn_varlen_func`: prompts and decoding."""
    with_cache: Callable[..., Tensor]
    """`flash_attn_with_kvcache`: one token of each sequence, with lengths on the device only."""


CudaPaths = Literal["auto", "on", "off"]


def choose_flash(paths: CudaPaths, shapes: Mapping[int, Any]) -> tuple[FlashFunctions | None, str]:
    """What attends, and how it is called for people; None for torch's own attention.

    Raises:
        ConfigError: it is to be used, and cannot be.
    """
    if paths == "off":
        return None, "torch"
    found, reason = load_flash(shapes)
    if found is None and paths == "on":
        raise ConfigError(f"--cuda-paths on: flash-attn cannot be used: {reason}; use auto or off")
    return found, "torch" if found is None else "flash-attn (not measured on a GPU yet)"


def load_flash(shapes: Mapping[int, Any]) -> tuple[FlashFunctions | None, str]:
    """flash-attn's functions for layers of these shapes; None, with the reason, if not for them.

    Args:
        shapes: `attention.LayerShape` of each layer.
    """
    for layer, shape in shapes.items():
        if shape.device.type != "cuda":
            return None, f"the model is on {shape.device.type}, not on a GPU"
        if shape.dtype not in _DTYPES:
            return None, f"the model computes in {shape.dtype}, and flash-attn in 16 bits only"
        if shape.head_dim > _MOST_HEAD_DIM or shape.head_dim % 8:
            return (
                None,
                f"layer {layer} has heads of {shape.head_dim} numbers, and it takes up to 256",
            )
        if torch.cuda.get_device_capability(shape.device) < (8, 0):
            return None, "it needs a GPU of compute capability 8.0"
    if find_spec("flash_attn") is None:
        return None, "flash-attn is not installed (pip install 'qlora-serve[flash]')"
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    return FlashFunctions(flash_attn_varlen_func, flash_attn_with_kvcache), ""


class FlashCache:
    """Keys and values of all layers, in blocks as flash-attn reads them.

    Args:
        shapes: of the layers, by their index.
        windows: of the groups.
        blocks: of each group.
    """

    def __init__(
        self, shapes: Mapping[int, Any], windows: Sequence[int | None], blocks: Sequence[int]
    ) -> None:
        self.group = {layer: windows.index(shape.window) for layer, shape in shapes.items()}
        self.layers = {
            layer: torch.empty(
                2, blocks[self.group[layer]] + 1, PAGE_TOKENS, shape.kv_heads, shape.head_dim,
                dtype=shape.dtype, device=shape.device,
            )
            for layer, shape in shapes.items()
        }  # fmt: skip
        """[keys or values, blocks and one for rows that are nobody's, PAGE_TOKENS, kv_heads,
        head_dim]"""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies whole blocks, one after the other: a later one may read what was written."""
        for one in copies:
            for layer, store in self.layers.items():
                if self.group[layer] == one.group:
                    store[:, one.target] = store[:, one.source]


class FlashStep:
    """Where the tokens of one step lie: made once, used by every layer.

    Args:
        spans: of the step, `attention.Span`.
        groups: of layers with the same window.
        device: of the model.
        flash: computes.
    """

    def __init__(
        self, spans: Sequence[Any], groups: int, device: torch.device, flash: FlashFunctions
    ) -> None:
        self._varlen = flash.varlen
        counts = [span.last - span.first for span in spans]
        ends = [span.start + count for span, count in zip(spans, counts, strict=True)]
        self._longest_new, self._longest = max(counts), max(ends)
        self._first_new = _on(device, np.cumsum([0, *counts], dtype=np.int32))  # [spans + 1]
        self._first = _on(device, np.cumsum([0, *ends], dtype=np.int32))  # [spans + 1]
        self._tables: list[Tensor] = []
        """Of each group, int32 [spans, blocks]."""
        self._slots: list[Tensor] = []
        """Of each group, int64 [tokens]: where each new token goes."""
        width = -(-self._longest // PAGE_TOKENS)
        for group in range(groups):
            table = np.zeros((len(spans), width), dtype=np.int32)
            slots = []
            for number, (span, end) in enumerate(zip(spans, ends, strict=True)):
                blocks = np.asarray(span.blocks[group][:width], dtype=np.int64)
                # Blocks that left the window are never read; the table must hold valid ones.
                table[number, : len(blocks)] = np.maximum(blocks, 0)
                positions = np.arange(span.start, end)
                first = blocks[positions // PAGE_TOKENS] * PAGE_TOKENS
                slots.append(first + positions % PAGE_TOKENS)
            self._tables.append(_on(device, table))
            self._slots.append(_on(device, np.concatenate(slots)))

    def attend(
        self,
        cache: FlashCache,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Stores the new keys and values, and attends.

        Args:
            cache: of the engine.
            layer: which of its layers.
            query: [1, heads, tokens, head_dim]
            key: [1, kv_heads, tokens, head_dim]
            value: [1, kv_heads, tokens, head_dim]
            scale: multiplies the scores.
            window: a query sees this many tokens, itself included; None for all.
            softcap: scores are squeezed to ±softcap; None for not at all.

        Returns:
            [1, tokens, heads, head_dim]
        """
        store, group = cache.layers[layer], cache.group[layer]
        for part, new in enumerate((key, value)):
            store[part].flatten(0, 1).index_copy_(0, self._slots[group], new[0].transpose(0, 1))
        output = self._varlen(
            query[0].transpose(0, 1),
            store[0],
            store[1],
            self._first_new,
            self._first,
            self._longest_new,
            self._longest,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            block_table=self._tables[group],
        )
        return output[None]


def _on(device: torch.device, values: Any) -> Tensor:
    """numpy → the device, without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
