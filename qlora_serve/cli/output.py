"""Whose words go where: stdout belongs to a command's result."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """Sends to stderr what libraries print while a command works, so that `--json` stays JSON."""
    with redirect_stdout(sys.stderr):
        yield
