"""Memory that a process no longer uses, given back to the system."""

import ctypes
import gc
import os
import sys
from pathlib import Path

# How much a process may grow by gaps in its heap before they are given back.
_GROWTH = 1.05


def give_back() -> None:
    """Frees what nobody refers to, and the pages of the C library's heap that hold nothing.

    glibc keeps blocks below 32 MiB when they are freed. After something large, such as quantizing a
    base on a CPU, they are hundreds of megabytes that stay counted as the process's own.
    """
    gc.collect()
    _trim()


class HeapLimit:
    """Keeps a heap from creeping upwards while steps of changing sizes leave gaps in it."""

    def __init__(self) -> None:
        self._usual: int | None = None
        self._steps = 0

    def after_step(self) -> None:
        """Gives free pages back where the process has grown beyond its first two steps.

        The next step has to ask for them again, so that this is not done each time. The optimizer
        makes its state after the first step, so that one step alone would say too little.
        """
        held = _resident()
        if held is None:
            return
        self._steps += 1
        if self._usual is None or self._steps <= 2:
            self._usual = max(held, self._usual or 0)
        elif held > self._usual * _GROWTH:
            _trim()


def _trim() -> None:
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
    if trim is not None:
        trim(0)


def _resident() -> int | None:
    """Bytes of the process in memory; None where Linux does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
