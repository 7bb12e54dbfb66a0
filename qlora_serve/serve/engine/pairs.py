"""One linear layer's update by an adapter, as it lies in memory."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from qlora_serve.serve.engine.host_memory import Arena
from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.updates import add_update

_BLOCK = 16  # kernels.cpp's vector
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


def to_blocks(b_t: Tensor) -> Tensor:
    """[rank, out_features] → [out_features / 16 rounded up, rank, 16], filled up with zeros."""
    rank, out = b_t.shape
    padded = F.pad(b_t, (0, -out % _BLOCK))
    return padded.view(rank, -1, _BLOCK).transpose(0, 1).contiguous()


def from_blocks(blocks: Tensor, out_features: int) -> Tensor:
    """The inverse of `to_blocks`: [rank, out_features]."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)[:, :out_features]
