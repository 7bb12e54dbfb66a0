"""Settings for all tests."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Tiny models gain nothing from a second thread and lose much to waiting for it. Set before torch
# is imported, and inherited by the processes that tests start; the end-to-end tests undo it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once
# The kernels are what is under test; whether they are faster on this machine is not.
os.environ.setdefault("QLORA_SERVE_NATIVE", "always")
# Ignored signals are inherited: started in the background by a shell, the processes under test
# would not hear the Ctrl-C that they are sent.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Takes back how a command that ran within the test's process set up logging for all of it."""
    root, known = logging.getLogger(), logging.root.manager.loggerDict
    handlers, level = root.handlers[:], root.level
    levels = {name: one.level for name, one in known.items() if isinstance(one, logging.Logger)}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, one in known.items():
        if isinstance(one, logging.Logger):
            one.setLevel(levels.get(name, logging.NOTSET))
