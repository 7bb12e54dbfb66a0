"""A folder of adapters that is looked at again and again: what is there is what is served."""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from qlora_serve.adapters.folder import scan_adapters
from qlora_serve.errors import ConfigError, UnknownAdapterError
from qlora_serve.serve.engine.content import Signature, signature
from qlora_serve.serve.engine.registry import AdapterRegistry, Registered

log = logging.getLogger(__name__)


class AdapterFolder:
    """Keeps a registry's names in step with a folder's sub-directories."""

    def __init__(
        self, registry: AdapterRegistry, path: Path, reserved: Collection[str] = ()
    ) -> None:
        """
        Args:
            registry: what to keep in step.
            path: the folder.
            reserved: names that belong to others; a sub-directory of such a name is not served.
        """
        self.path = path
        self._registry = registry
        self._reserved = frozenset(reserved)
        self.also_reserved: Callable[[], Collection[str]] = tuple
        """Further names that belong to others, at this moment."""
        self._seen: dict[str, tuple[Path, Signature | None]] = {}
        self._said: set[str] = set()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def scan(
        self,
        pins: Collection[str] = (),
        report: Callable[[int, int, Registered], None] | None = None,
    ) -> None:
        """Looks once: new names appear, changed ones are replaced, removed ones go.

        A name that was unloaded by hand stays away until its files change.

        Args:
            pins: names to pin when they appear.
            report: called with the count done, the count to do, and what was added.

        Raises:
            ConfigError: the folder is missing.
        """
        scan = scan_adapters(self.path)
        found = {name: entry.path for name, entry in scan.entries.items()}
        for problem in scan.refused.values():
            self._say(f"in {self.path}: {problem}")
        reserved = self._reserved.union(self.also_reserved())
        for name in sorted(found.keys() & reserved):
            self._say(f"{found[name]} is not served: its name {name!r} is taken")
        # Of a managed adapter the path is its content's, so that a replacement is another path.
        signatures = {n: (p, signature(p)) for n, p in found.items() if n not in reserved}
        gone = [name for name in self._seen if name not in signatures]
        for name in gone:
            self._remove(name)
        changed = [n for n, s in signatures.items() if n not in self._seen or self._seen[n] != s]
        for done, name in enumerate(changed, 1):
            self._seen[name] = signatures[name]
            entry = self._registry.add(name, found[name], name in pins)
            if entry.reason:
                self._say(f"adapter {name!r} cannot be used: {entry.reason}")
            if report is not None:
                report(done, len(changed), entry)
        self._registry.sweep()  # also what the last requests of an unloaded name have left

    def start(self, interval: float) -> None:
        """Looks again every `interval` seconds, in a thread."""
        self._thread = threading.Thread(
            target=self._run, args=(interval,), name="adapters-dir", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; returns when it is done."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, interval: float) -> None:
        while not self._end.wait(interval):
            try:
                self.scan()
            except ConfigError as error:
                self._say(str(error))
            except Exception:  # such as a file that went away under our hands: next time
                log.exception("looking at %s failed", self.path)

    def _remove(self, name: str) -> None:
        path, _ = self._seen.pop(name)
        try:
            if self._registry.entry(name).path == path:
                self._registry.unload(name)
        except UnknownAdapterError:
            return  # unloaded by hand

    def _say(self, message: str) -> None:
        """Warns of each thing once."""
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)
