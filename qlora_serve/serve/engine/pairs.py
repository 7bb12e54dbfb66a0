"""One linear layer's update by an adapter, as it lies in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_serve.adapters.weights import LoraPair
from qlora_serve.serve.engine.host_memory import Arena, huge_pages
from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.updates import add_update

_BLOCK = 16  # vectors.h's vector
_LINE = 32  # numbers in two cache lines, where matrices begin
_UPDATE = np.dtype(  # layout.cpp's
    [(name, np.int64) for name in ("in", "out", "rank", "a", "b", "a_to", "b_to")]
    + [("scaling", np.float32)],
    align=True,
)
_SPARE_BYTES = 512  # for the alignment of a pair's two matrices, and what may be read beyond one


@dataclass(frozen=True)
class ResidentPair:
    """One linear layer's update: `y = base(x) * gain + (x @ aᵀ) @ b_t + offset`.

    Plain LoRA has the matrices alone. DoRA (arXiv:2402.09353) has a gain as well, and an offset
    where the layer has a bias, which is not to be scaled. A new bias is an offset.
    """

    a: Tensor | None
    """[rank, in_features]; None where only the bias changes. Beside `blocks` it lies the other way
    round in memory, see `for_kernels`."""
    b_t: Tensor | None
    """[rank, out_features], already multiplied by the scaling and the gain; None where only the
    bias changes, or where `blocks` holds it"""
    gain: Tensor | None = None
    """[out_features], float32"""
    offset: Tensor | None = None
    """[out_features], float32"""
    blocks: Tensor | None = None
    """[out_features / 16 rounded up, rank, 16]: what `b_t` would be, as the kernels read it"""

    @property
    def is_plain(self) -> bool:
        """Whether the two matrices are all."""
        return self.gain is None and self.offset is None

    def update(
        self,
        output: Tensor,
        hidden: Tensor,
        scale: float = 1.0,
        kernels: Kernels | None = None,
    ) -> None:
        """Turns the base's output [rows, out_features] for `hidden` [rows, in_features] into ours.

        In place: `output` is a view of the whole step's. `scale` is the request's own; where there
        is a gain it is 1, since the gain holds for one scale only.
        """
        assert scale == 1 or self.gain is None, "DoRA's gain holds for one scale"
        if self.gain is not None:
            output.mul_(self.gain)
        if self.a is not None and self.blocks is not None and kernels is not None:
            add_update(kernels, hidden, self.a, self.blocks, scale, output)
        elif self.a is not None:
            low = F.linear(hidden.to(self.a.dtype), self.a)  # [rows, rank]
            b_t = self.b_t if self.blocks is None else from_blocks(self.blocks, output.shape[1])
            assert b_t is not None
            output.addmm_(low.to(output.dtype), b_t, alpha=scale)
        if self.offset is not None:
            output.add_(self.offset, alpha=scale)

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        parts = (self.a, self.b_t, self.gain, self.offset, self.blocks)
        return sum(part.nbytes for part in parts if part is not None)


def for_kernels(pair: ResidentPair) -> ResidentPair:
    """An update in the memory layout of the kernels.

    They read `a` input by input, 16 components at a time, and so up to 15 numbers beyond its end.
    """
    assert pair.a is not None
    assert pair.b_t is not None
    room = pair.a.new_zeros(pair.a.numel() + _BLOCK)
    return replace(pair, a=_by_input(pair.a, room), b_t=None, blocks=to_blocks(pair.b_t))


def _by_input(a: Tensor, room: Tensor) -> Tensor:
    """`a` [rank, in_features] with the components of an input side by side, within `room`."""
    a_t = room[: a.numel()].view(a.shape[1], a.shape[0])
    a_t.copy_(a.t())
    return a_t.t()


def packed(pairs: list[ResidentPair | None]) -> list[ResidentPair | None]:
    """The matrices that the kernels read, one after the other in memory of their own.

    A step reads them in this order, and large pages make that as fast as it can be.
    """
    size = sum(pair.size_bytes + _SPARE_BYTES for pair in pairs if pair and pair.blocks is not None)
    arena = Arena(size)
    found = list(pairs)
    for number, pair in enumerate(pairs):
        if pair is not None and pair.a is not None and pair.blocks is not None:
            room = arena.empty(pair.a.numel() + _BLOCK, dtype=pair.a.dtype)
            found[number] = replace(pair, a=_by_input(pair.a, room), blocks=arena.copy(pair.blocks))
    return found


def is_stored_plainly(pair: LoraPair) -> bool:
    """Whether a stored update is two float32 matrices on the CPU and nothing else."""
    return (
        pair.magnitude is None
        and pair.b_bias is None
        and all(
            part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous()
            for part in (pair.a, pair.b)
        )
    )


def laid_out(plain: Mapping[int, LoraPair], kernels: Kernels) -> dict[int, ResidentPair]:
    """What `packed` gives for updates that are `is_stored_plainly`, by one call.

    It needs Python's lock once, where a few hundred of torch's operators would each need it.
    """
    updates = np.zeros(len(plain), _UPDATE)
    updates["in"] = [pair.a.shape[1] for pair in plain.values()]
    updates["out"] = [pair.b.shape[0] for pair in plain.values()]
    updates["rank"] = [pair.a.shape[0] for pair in plain.values()]
    updates["a"] = [pair.a.data_ptr() for pair in plain.values()]
    updates["b"] = [pair.b.data_ptr() for pair in plain.values()]
    updates["scaling"] = [pair.scaling for pair in plain.values()]
    # The numbers of each matrix, and what it takes: up to 15 beyond `a` may be read.
    a_numbers = updates["in"] * updates["rank"]
    b_numbers = -(-updates["out"] // _BLOCK) * _BLOCK * updates["rank"]
    rooms = np.stack([a_numbers + _BLOCK, b_numbers], 1)
    rooms = -(-rooms // _LINE) * _LINE
    begins = (np.cumsum(rooms) - rooms.ravel()).reshape(-1, 2)
    memory = huge_pages(4 * int(rooms.sum())).view(torch.float32)
    updates["a_to"], updates["b_to"] = memory.data_ptr() + 4 * begins.T
    kernels.lay_out_updates(updates.ctypes.data, len(updates))
    a_ends, b_ends = begins[:, 0] + a_numbers, begins[:, 1] + b_numbers
    places = zip(plain, updates["rank"], begins, a_ends, b_ends, strict=True)
    return {
        index: ResidentPair(
            memory[a_begin:a_end].view(-1, rank).t(),
            None,
            blocks=memory[b_begin:b_end].view(-1, rank, _BLOCK),
        )
        for index, rank, (a_begin, b_begin), a_end, b_end in places
    }


def to_blocks(b_t: Tensor) -> Tensor:
    """[rank, out_features] → [out_features / 16 rounded up, rank, 16], filled up with zeros."""
    rank, out = b_t.shape
    padded = F.pad(b_t, (0, -out % _BLOCK))
    return padded.view(rank, -1, _BLOCK).transpose(0, 1).contiguous()


def from_blocks(blocks: Tensor, out_features: int) -> Tensor:
    """The inverse of `to_blocks`: [rank, out_features]."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)[:, :out_features]
