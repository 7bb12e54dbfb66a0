"""No memory left: an error of the one adapter that was to be loaded, in words."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_serve.errors import AdapterError

_TORCH_SAYS = "can't allocate memory"  # a plain RuntimeError on a CPU


@contextmanager
def needs_memory(name: str) -> Iterator[None]:
    """Within it an adapter is loaded.

    Raises:
        AdapterError: in the place of whatever says that memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise AdapterError(
            f"there is no memory left to load adapter {name!r}; unload others, or start with a "
            "smaller --kv-memory, --adapter-memory or --adapter-host-memory"
        ) from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, on a GPU
        or (isinstance(error, RuntimeError) and _TORCH_SAYS in str(error))
    )
