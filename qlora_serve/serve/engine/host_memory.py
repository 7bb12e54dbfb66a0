"""The host's memory: large pages, weights out of mapped files, and what is given back."""

import ctypes
import ctypes.util
import mmap
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qlora_serve.serve.engine.large_pages import LARGE_PAGE, map_large_pages

ALIGNMENT = 128  # two cache lines, which processors fetch together
_CHUNK = 64 << 20


class Arena:
    """Memory in large pages, from which tensors are cut one after the other.

    Weights are read from end to end in each step. In pages of 4 kB the processor has to look up
    where each one lies, and its own prefetching stops at the end of each; in pages of 2 MB neither
    matters (docs/performance.md). A tensor keeps its chunk of memory; a chunk is given back when
    the last of its tensors is gone. What is never written to takes no room.

    Args:
        chunk: bytes that are taken from the system at a time.
        first: memory to begin with, from `map_large_pages`.
    """

    def __init__(self, chunk: int = _CHUNK, first: mmap.mmap | None = None) -> None:
        self._chunk = chunk
        self._rest: Tensor | None = None if first is None else _aligned(first)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor with undefined (at first zero) content."""
        size = prod(shape) * dtype.itemsize
        room = -(-size // ALIGNMENT) * ALIGNMENT
        if self._rest is None or self._rest.numel() < room:
            self._rest = huge_pages(max(room, self._chunk))
        taken, self._rest = self._rest[:size], self._rest[room:]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, in this memory."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def huge_pages(size: int) -> Tensor:
    """`size` bytes, uint8 [size], from the start of a large page, where the system has them."""
    return _aligned(map_large_pages(size))[:size]


def _aligned(memory: mmap.mmap) -> Tensor:
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    return everything[-everything.data_ptr() % LARGE_PAGE :]


def own_memory(model: Any, arena: Arena) -> None:
    """Takes a model's weights on the CPU out of the files that they are mapped from.

    One tensor that still points into a mapped file keeps all of the file's pages in the process,
    and a file that is overwritten would change the weights of a running server.

    Args:
        model: whose parameters and buffers are copied.
        arena: to which they are copied.
    """
    owned: dict[int, Tensor] = {}  # by address, so that tied weights stay tied
    for tensor in (*model.parameters(), *model.buffers()):
        address = tensor.data_ptr()
        is_plain = type(tensor) in (nn.Parameter, Tensor) and tensor.device.type == "cpu"
        if not is_plain or not tensor.is_contiguous() or tensor.numel() == 0:
            continue
        if address not in owned:
            owned[address] = arena.copy(tensor.data)
        if owned[address].shape == tensor.shape:
            tensor.data = owned[address]


def give_back() -> None:
    """Returns to the system what was freed, which glibc keeps for later; elsewhere nothing."""
    name = ctypes.util.find_library("c")
    with suppress(OSError, AttributeError):
        ctypes.CDLL(name).malloc_trim(0)
