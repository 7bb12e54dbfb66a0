"""Stopping a long run when asked to, at a place where nothing is lost."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NOTICE = b"\nstopping after this step, to save a checkpoint; Ctrl-C again stops at once\n"


class StopRequest:
    """Whether someone has asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_on_signals(notice: bool = True) -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the second stops at once.

    Args:
        notice: whether to say that the request was heard.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    request = StopRequest()

    def handle(_: int, __: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        if notice:
            os.write(2, _NOTICE)  # printing in the usual way could meet a lock that is being held

    with _handling(handle):
        yield request


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM unwind as Ctrl-C does, so that nothing half-written stays behind."""

    def handle(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(handle):
        yield


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in signals}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def forward_signals(forward: Callable[[], None]) -> Iterator[StopRequest]:
    """Hands each SIGINT and SIGTERM on to the processes that do the work."""
    request = StopRequest()

    def handle(_: int, __: FrameType | None) -> None:
        request.asked = True
        forward()

    with _handling(handle):
        yield request


def die_with_parent() -> None:
    """Lets this process be killed when the one that started it is, where the system can do it."""
    if not sys.platform.startswith("linux"):
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
