"""Decoding steps as CUDA graphs: launched once, with everything that changes in fixed buffers.

A step of a few rows is hundreds of small kernels, and launching them takes longer than they run. A
graph launches them all at once, but only ever the same ones on the same memory. So a step's inputs
are copied into buffers for 1, 2, 4, … rows, and adapters into slots of equal rank.

Not measured on a GPU yet. The tests run all of it on a CPU, where a replay calls the function
again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_serve.serve.engine.attention import StepContext
from qlora_serve.serve.engine.flash import PAGE_TOKENS, FlashCache
from qlora_serve.serve.engine.lora import ResidentAdapter
from qlora_serve.serve.engine.pairs import ResidentPair, from_blocks
from qlora_serve.serve.engine.scheduler import Chunk, Limits

log = logging.getLogger(__name__)

SLOTS = 8
"""Adapters that graphs hold at once; a step with more of them is run without."""
RANK = 16
"""The highest rank; adapters of a higher one are run without."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""A function of fixed buffers → what computes it again, with its result in the same memory."""


def capture_cuda(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records a function's kernels; calling the result replays them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once before, so that libraries have made their workspaces
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Adapters may be loaded by another thread meanwhile: what that does is not for this graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def bucket(rows: int, largest: int) -> int:
    """The rows that a graph for `rows` rows has: the next power of two, at most `largest`.

    >>> [bucket(rows, 12) for rows in (1, 2, 3, 8, 9, 12)]
    [1, 2, 4, 8, 12, 12]
    """
    return min(1 << (rows - 1).bit_length(), largest)


class GraphSlots:
    """Adapters side by side in equal room: one gather and two products for all rows of a step.

    Args:
        shapes: (in_features, out_features) of each adapter layer.
        rows: the most rows of a step.
        dtype: of the adapters' matrices.
        device: of the model.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        options: Any = {"dtype": dtype, "device": device}
        # Slot 0 stays zeros, for rows without an adapter.
        self._a = [torch.zeros(SLOTS + 1, RANK, inside, **options) for inside, _ in shapes]
        self._b = [torch.zeros(SLOTS + 1, RANK, outside, **options) for _, outside in shapes]
        self._held: OrderedDict[str, int] = OrderedDict()  # identity → slot, the latest last
        self.rows = torch.zeros(rows, dtype=torch.long, device=device)
        """The slot of each row."""
        self.scales = torch.zeros(rows, 1, dtype=dtype, device=device)
        """What each row's request scales its adapter by."""

    def add(self, index: int, hidden: Tensor, output: Tensor) -> Tensor:
        """Adds each row's update: [1, rows, in_features], [1, rows, out_features] → the latter."""
        count = hidden.shape[1]
        slots = self.rows[:count]
        low = torch.bmm(self._a[index][slots], hidden[0, :, :, None])  # [rows, RANK, 1]
        update = torch.bmm(low.transpose(1, 2), self._b[index][slots])[:, 0]  # [rows, out]
        return output + (update * self.scales[:count])[None].to(output.dtype)

    def place(self, residents: Sequence[ResidentAdapter | None]) -> list[int] | None:
        """The slot of each row's adapter, copied there if need be; None where they do not fit."""
        wanted = {one.identity: one for one in residents if one is not None}
        if len(wanted) > SLOTS or not all(_fits(one) for one in wanted.values()):
            return None
        for identity in wanted.keys() & self._held.keys():
            self._held.move_to_end(identity)
        for identity in wanted.keys() - self._held.keys():
            slot = len(self._held) + 1
            if slot > SLOTS:
                _, slot = self._held.popitem(last=False)  # none of this step's: they came last
            self._fill(slot, wanted[identity].pairs)
            self._held[identity] = slot
        return [0 if one is None else self._held[one.identity] for one in residents]

    def _fill(self, slot: int, pairs: Sequence[ResidentPair | None]) -> None:
        for a, b, pair in zip(self._a, self._b, pairs, strict=True):
            a[slot].zero_()
            b[slot].zero_()
            if pair is None:
                continue
            assert pair.a is not None
            b_t = pair.b_t if pair.blocks is None else from_blocks(pair.blocks, b.shape[2])
            assert b_t is not None
            a[slot, : len(pair.a)] = pair.a
            b[slot, : len(b_t)] = b_t


def _fits(adapter: ResidentAdapter) -> bool:
    pairs = [pair for pair in adapter.pairs if pair is not None]
    is_plain = not adapter.own and all(pair.is_plain and pair.a is not None for pair in pairs)
    return is_plain and all(len(pair.a) <= RANK for pair in pairs if pair.a is not None)


class DecodeGraphs:
    """Runs the steps in which everyone decodes, if their adapters fit.

    Args:
        forward: (ids, positions, rows to keep) → logits; the model's.
        context: of the model's layers.
        limits: of the engine.
        slots: for its adapters.
        with_cache: `flash_attn.flash_attn_with_kvcache`, or what stands in for it.
        capture: makes a graph.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        context: StepContext,
        limits: Limits,
        slots: GraphSlots,
        with_cache: Callable[..., Tensor],
        capture: Capture,
    ) -> None:
        assert isinstance(context.cache, FlashCache)
        self._forward, self._context, self._slots = forward, context, slots
        self._with_cache, self._capture = with_cache, capture
        self._largest = limits.max_sequences
        self._scratch = [group.blocks for group in limits.groups]  # the cache has one block more
        self._width = -(-limits.max_length // PAGE_TOKENS)
        device = slots.rows.device
        rows, groups = self._largest, len(limits.groups)
        whole: Any = {"dtype": torch.long, "device": device}
        self._ids = torch.zeros(1, rows, **whole)
        self._positions = torch.zeros(1, rows, **whole)
        self._kept = torch.arange(rows, device=device)
        self._places = torch.zeros(groups, rows, **whole)
        """Where each row's key and value go, by group."""
        self._tables = torch.zeros(groups, rows, self._width, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._graphs: dict[int, Callable[[], Tensor]] = {}
        self.replays = 0
        """Steps that ran as graphs."""

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits [chunks, vocabulary]; None where the step has to be run without a graph."""
        if len(chunks) > self._largest or not all(c.count == 1 and c.samples for c in chunks):
            return None
        adapters = [chunk.sequence.request.adapter for chunk in chunks]
        parts = [() if adapter is None else adapter.residents for adapter in adapters]
        if any(len(part) > 1 for part in parts):
            return None  # a composition
        slots = self._slots.place([part[0].resident if part else None for part in parts])
        if slots is None:
            return None
        size = bucket(len(chunks), self._largest)
        spare = size - len(chunks)
        self._fill(chunks, size)
        _put(self._slots.rows, [*slots, *[0] * spare])
        scales = [part[0].scale if part else 0.0 for part in parts]
        _put(self._slots.scales, [[scale] for scale in (*scales, *[0.0] * spare)])
        if size not in self._graphs:
            self._graphs[size] = self._capture(lambda: self._compute(size))
        self.replays += 1
        return self._graphs[size]()[: len(chunks)]

    def _fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Copies a step's inputs to the buffers. Rows to spare write to a block of their own."""
        spare = size - len(chunks)
        positions = [chunk.start for chunk in chunks]
        ids = [chunk.sequence.tokens(chunk.start, 1)[0] for chunk in chunks]
        _put(self._ids[0], [*ids, *[0] * spare])
        _put(self._positions[0], [*positions, *[0] * spare])
        _put(self._lengths, [*(position + 1 for position in positions), *[1] * spare])
        for group, scratch in enumerate(self._scratch):
            tables, places = [], []
            for chunk, position in zip(chunks, positions, strict=True):
                blocks = chunk.sequence.blocks.blocks[group][: self._width]
                places.append(
                    blocks[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
                )
                valid = [max(block, 0) for block in blocks]  # what left the window is never read
                tables.append([*valid, *[0] * (self._width - len(valid))])
            _put(self._places[group], [*places, *[scratch * PAGE_TOKENS] * spare])
            _put(self._tables[group], [*tables, *[[scratch] * self._width] * spare])

    def _compute(self, size: int) -> Tensor:
        context = self._context
        context.flash, context.slots = _StaticAttention(self, size), self._slots
        context.adapter_rows, context.output_rows = [], []
        context.adapter_updates = context.output_updates = None
        try:
            return self._forward(self._ids[:, :size], self._positions[:, :size], self._kept[:size])
        finally:
            context.slots = None

    def attend(
        self, size: int, cache: FlashCache, layer: int, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """See `flash.FlashStep.attend`: one token of each row."""
        store, group = cache.layers[layer], cache.group[layer]
        for part, new in enumerate((key, value)):
            store[part].flatten(0, 1).index_copy_(
                0, self._places[group, :size], new[0].transpose(0, 1)
            )
        output = self._with_cache(
            query[0].transpose(0, 1)[:, None],  # [rows, 1, heads, head_dim]
            store[0],
            store[1],
            cache_seqlens=self._lengths[:size],
            block_table=self._tables[group, :size],
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )
        return output[:, 0][None]


class _StaticAttention:
    """Stands where a step's `FlashStep` does."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self._graphs, self._size = graphs, size

    def attend(self, *arguments: Any) -> Tensor:
        """See `flash.FlashStep.attend`."""
        return self._graphs.attend(self._size, *arguments)


def _put(buffer: Tensor, values: Any) -> None:
    """Copies a list to the beginning of a buffer, without waiting for the device."""
    fresh = torch.tensor(values, dtype=buffer.dtype)
    if buffer.device.type == "cuda":
        fresh = fresh.pin_memory()
    buffer[: len(fresh)].copy_(fresh, non_blocking=True)
