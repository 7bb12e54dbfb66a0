"""Memory in large pages, and such that is ready before it is needed; without torch."""

import ctypes
import mmap
from contextlib import suppress
from threading import Event, Thread

LARGE_PAGE = 2 << 20
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14; Python has no name for it
_PIECE = 16 << 20


def map_large_pages(size: int) -> mmap.mmap:
    """At least `size` bytes and one large page more, in large pages where the system has them."""
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= LARGE_PAGE:
        with suppress(OSError, AttributeError):  # a kernel, or a system, without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class PagesAhead:
    """Memory that the system hands over before it is written to.

    New memory is zeroed by the system, and in a virtual machine often fetched from its host first:
    half a second for each few hundred megabytes. A core does that which has nothing else to do
    while another one imports torch.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = map_large_pages(size)
        self._end = Event()
        self._thread = Thread(target=self._populate, name="pages-ahead", daemon=True)
        self._thread.start()

    def take(self) -> mmap.mmap:
        """The memory, as far as it is ready; the rest becomes so when it is written to."""
        self._end.set()
        self._thread.join()
        return self._memory

    def _populate(self) -> None:
        libc = ctypes.CDLL(None)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for begin in range(0, self.size, _PIECE):
            piece = ctypes.c_size_t(min(_PIECE, self.size - begin) // mmap.PAGESIZE * mmap.PAGESIZE)
            at = ctypes.c_void_p(first + begin)
            # Python's own lock is free meanwhile; a system that cannot do it says so at once.
            if self._end.is_set() or libc.madvise(at, piece, _POPULATE_WRITE) != 0:
                return
