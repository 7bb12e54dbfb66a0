"""The adapters that a server knows: names that point to content."""

import threading
from pathlib import Path

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.errors import UnknownAdapterError
from qlora_serve.serve.engine.lora import ResidentAdapter
from qlora_serve.serve.engine.runner import Runner


class AdapterRegistry:
    """Names → adapters that are ready to serve. Safe to use from any thread.

    A request resolves its name once and then holds the adapter itself, so that loading another
    one under the same name, or unloading it, never changes an answer half way.
    """

    def __init__(self, runner: Runner, fit: FitChecker | None = None) -> None:
        self._runner = runner
        self._fit = fit or FitChecker(runner.base.source)
        self._by_name: dict[str, ResidentAdapter] = {}
        self._lock = threading.Lock()

    def load(self, name: str, path: Path) -> ResidentAdapter:
        """Reads, checks and loads an adapter; an older one of that name is replaced.

        Raises:
            AdapterError: it cannot be applied exactly to this base; the older one stays.
        """
        weights = load_weights(read_adapter(path), self._fit)
        resident = self._runner.resident(name, weights)
        with self._lock:
            self._by_name[name] = resident
        return resident

    def unload(self, name: str) -> None:
        """Forgets a name. Requests that run keep their adapter until they end.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        with self._lock:
            if self._by_name.pop(name, None) is None:
                raise UnknownAdapterError(name, self._by_name)

    def resolve(self, name: str) -> ResidentAdapter:
        """The adapter that a name points to now.

        Raises:
            UnknownAdapterError: there is no such name; the message lists those there are.
        """
        with self._lock:
            found = self._by_name.get(name)
            if found is None:
                raise UnknownAdapterError(name, self._by_name)
            return found

    def names(self) -> list[str]:
        """Every name, sorted."""
        with self._lock:
            return sorted(self._by_name)
