"""Files written past the page cache.

What is written through the cache is copied into pages that must first be found, which on a machine
with much else in its cache takes longer than merging; and it pushes out the base, which is about to
be read. Direct writes (O_DIRECT) go from the buffer to the disk. They ask for whole blocks at
addresses and offsets that are multiples of a block.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

BLOCK = 4096
"""A multiple of the block size of every usual disk."""


class Buffer:
    """Memory for a run of a file's bytes, at an address like their offset, modulo a block."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, -(-size // BLOCK) * BLOCK + 2 * BLOCK)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def place(self, offset: int, size: int) -> Any:
        """The part, uint8 [size], for what goes to an offset of the file."""
        start = offset % BLOCK
        return self.bytes[start : start + size]


class DirectFile:
    """A new file that is written in order, from `Buffer`s."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._set_direct(True)
        self._size = 0
        # The begun block at the end of what was given, which waits for its rest.
        self._rest = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def write(self, buffer: Buffer, size: int) -> None:
        """Appends `size` bytes that were put where `buffer.place` told for the file's end."""
        begun = len(self._rest)
        assert begun == self._size % BLOCK
        buffer.bytes[:begun] = self._rest
        whole = (begun + size) // BLOCK * BLOCK
        self._put(buffer.bytes[:whole], self._size - begun)
        self._rest = buffer.bytes[whole : begun + size].clone()
        self._size += size

    def append(self, content: bytes) -> None:
        """Appends a few bytes."""
        buffer = Buffer(len(content))
        place = buffer.place(self._size, len(content))
        place.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.write(buffer, len(content))

    def finish(self) -> None:
        """Writes the last block and flushes the file to the disk."""
        begun = len(self._rest)
        if begun:
            buffer = Buffer(BLOCK)
            buffer.bytes[:begun] = self._rest
            self._put(buffer.bytes[:BLOCK], self._size - begun)
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)

    def _put(self, part: Any, offset: int) -> None:
        view = memoryview(part.numpy())
        while view:
            try:
                count = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                # Not on this file system, or not with blocks of this size.
                if error.errno != errno.EINVAL or not self._set_direct(False):
                    raise
                continue
            view, offset = view[count:], offset + count

    def _set_direct(self, wanted: bool) -> bool:
        """Whether it had to be changed, and could be."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if bool(flags & direct) == wanted or not direct:
            return False
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags ^ direct)
        except OSError:
            return False
        return True
