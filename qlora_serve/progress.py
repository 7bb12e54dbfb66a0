"""Progress for long work: a bar on a terminal, plain lines anywhere else."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

# Reports go to stderr: stdout belongs to a command's result (`--json` must stay parseable).
console = Console(stderr=True, highlight=False)

_PLAIN_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What long work calls to say how far it is."""

    def update(self, done: float, note: str = "") -> None:
        """Reports `done` units of the total; `note` is a few words, such as the loss."""


class _Plain:
    """A line at the start, every ten seconds, and at the end."""

    def __init__(self, title: str, total: float | None) -> None:
        self._title, self._total = title, total
        self._last = self._start = time.monotonic()
        console.print(f"{title} ...", soft_wrap=True)

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < _PLAIN_SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = f" {done:g}/{self._total:g}" if self._total else ""
        console.print(f"{self._title}{share} {note}".rstrip(), soft_wrap=True)

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        console.print(f"{self._title}: done in {seconds:.1f} s", soft_wrap=True)


class _Silent:
    """Nothing."""

    def update(self, done: float, note: str = "") -> None:
        pass


@contextmanager
def progress(title: str, total: float | None = None, silent: bool = False) -> Iterator[Progress]:
    """Shows how long work advances.

    Args:
        title: what is done.
        total: the units of it; None when their number is not known.
        silent: show nothing, as in all but one of several processes.
    """
    if silent:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        plain = _Plain(title, total)
        yield plain
        plain.finish()
        return
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
    if total is not None:
        columns.append(TextColumn("{task.completed:g}/{task.total:g}"))
    columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        class _Rich:
            def update(self, done: float, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

        yield _Rich()
        if total is not None:
            bar.update(task, completed=total)
        else:
            bar.update(task, total=1, completed=1)


def quieten_libraries() -> None:
    """Keeps libraries from showing progress and hints of their own, here and in child processes."""
    # Progress and errors are ours to show; a user who wants more sets these themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # They only say that a faster path is not there, and tell transformers what to do otherwise.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
