"""The feedback's file, off the event loop: everything goes through one thread, in order."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from qlora_serve.errors import FeedbackUnavailableError
from qlora_serve.serve.feedback.experiment import Experiment
from qlora_serve.serve.feedback.store import Answered, FeedbackStore

log = logging.getLogger(__name__)
T = TypeVar("T")


class FeedbackLog:
    """Experiments that run, and what is kept of answers.

    Args:
        path: the file; None keeps the latest answers in memory, and runs no experiments.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._store = FeedbackStore(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._is_closed = False
        self.is_kept = path is not None
        """Whether it outlives the server."""
        self.experiments: dict[str, Experiment] = {}
        """Those that run, by name. Changed on the event loop only."""

    def restore(self, begun: Sequence[Experiment], models: Collection[str]) -> None:
        """Runs experiments at start: those of the settings, which win, and those of the file.

        Args:
            begun: of the settings.
            models: names that mean base or adapters now.
        """
        for experiment in self._store.begun():
            if experiment.name in models:
                log.warning("experiment %r rests: the name means a model now", experiment.name)
            else:
                self.experiments[experiment.name] = experiment
        self.experiments.update({experiment.name: experiment for experiment in begun})

    def record(self, answers: Sequence[Answered]) -> None:
        """Keeps answers, before any feedback that comes later is looked at."""

        def done(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:  # the answer itself is not harmed
                log.error("answers could not be kept for feedback: %s", error)

        self._thread.submit(self._store.add, answers).add_done_callback(done)

    async def run(self, work: Callable[[FeedbackStore], T]) -> T:
        """What `work` finds in the store.

        Raises:
            FeedbackUnavailableError: the file cannot be read or written now.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._store)
        except sqlite3.Error as error:
            raise FeedbackUnavailableError(f"the feedback's file cannot be used: {error}") from None

    def close(self) -> None:
        """Writes down what is waiting, and closes the file; a second time nothing happens."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.submit(self._store.close)
            self._thread.shutdown(wait=True)
