"""The adapters that a server knows: names that point to content, in memory or on disk."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import WEIGHTS_FILE, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.shortage import needs_memory
from qlora_serve.adapters.tokens import own_tokens
from qlora_serve.adapters.weights import AdapterWeights, check_settings_and_fit, load_weights
from qlora_serve.base.templates import TemplateProcess
from qlora_serve.errors import (
    AdapterError,
    AdapterUnavailableError,
    UnknownAdapterError,
)
from qlora_serve.serve.engine.content import (
    AdapterContent,
    Signature,
    describe_content,
    examine,
    read_verified,
    remember_identity,
    signature,
)
from qlora_serve.serve.engine.residency import HostCache, Residency
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scaling import scaled
from qlora_serve.serve.engine.slots import AdapterSelection, Slot, SlotKey

log = logging.getLogger(__name__)

_UNBOUNDED = 2**62


@dataclass(frozen=True)
class Registered:
    """A name, and what it points to."""

    name: str
    path: Path
    content: AdapterContent | None
    """None when it could never be used."""
    reason: str = ""
    """Why it, or what was to take its place, cannot be used."""
    default_scale: float = 1.0
    is_pinned: bool = False
    signature: Signature | None = None
    """Of the files, when they were last looked at."""
    load_error: str = ""
    """Why it could not be loaded when it was last tried, after it had been registered."""


class AdapterRegistry:
    """Names → adapters. Safe to use from any thread.

    A request resolves its names once and then holds content, so that loading another adapter under
    the same name, or unloading it, never changes an answer half way.
    """

    def __init__(
        self,
        runner: Runner,
        fit: FitChecker | None = None,
        memory: int = _UNBOUNDED,
        host_memory: int = _UNBOUNDED,
        templates: bool = False,
    ) -> None:
        """
        Args:
            runner: puts adapters on the device.
            fit: of the runner's base.
            memory: bytes for adapters on the device.
            host_memory: bytes for adapters in the host's memory.
            templates: whether adapters may bring chat templates of their own.
        """
        self._runner = runner
        self._fit = fit or FitChecker(runner.base.source)
        self._by_name: dict[str, Registered] = {}
        self._lock = threading.RLock()
        # Two changes at once could leave a name with the content of one and the pin of the other.
        self._changing = threading.Lock()
        self._templates = TemplateProcess("the adapter's chat template") if templates else None
        self.host = HostCache(host_memory)
        self.residency = Residency(memory, self._load_slot)

    def register(self, name: str, path: Path, pin: bool = False) -> Registered:
        """Checks an adapter and gives it a name; its weights are loaded when they are asked for.

        An older one of that name is replaced, for requests that come from now on.

        Raises:
            AdapterError: it cannot be applied exactly to this base, or is larger than the device's
                memory for adapters; the older one stays.
        """
        seen = signature(path)
        with needs_memory(name):
            content = examine(path, self._fit, self._runner.base.model, self._runner.item_bytes)
        return self._place(name, path, self._with_tokens(content), seen, pin)

    def load(self, name: str, path: Path, pin: bool = False) -> AdapterSelection:
        """Like `register`, and reads the weights at once: what they can show is found here.

        Raises:
            AdapterError: see `register`.
        """
        seen = signature(path)
        adapter = read_adapter(path)
        with needs_memory(name):
            expected = check_settings_and_fit(adapter, self._fit)
            weights = load_weights(adapter, self._fit)
            resident = self._runner.resident(name, weights)
        remember_identity(adapter.path, seen, weights.identity)
        content = describe_content(
            adapter, expected, weights.identity, self._runner.base.model, self._runner.item_bytes
        )
        content = self._with_tokens(content)
        self._keep(weights)  # before a pin makes the loader look for them
        entry = self._place(name, path, content, seen, pin)
        if self._slot_key(content, entry.default_scale) == (content.identity, 1.0):
            self.residency.adopt((content.identity, 1.0), content, resident, resident.size_bytes)
        return self.select([(name, None)])

    def _with_tokens(self, content: AdapterContent) -> AdapterContent:
        """The content with the adapter's own tokenizer, if it has one."""
        base = self._runner.base
        known = content.vocabulary or self._fit.embeddings.rows
        own = own_tokens(content.path, base.tokenizer, base.stop_token_ids, known, self._templates)
        return replace(content, tokens=own)

    def add(self, name: str, path: Path, pin: bool = False) -> Registered:
        """`load` while there is free room on the device, else `register`.

        Never raises: a bad adapter must not stop the others, so its name is recorded with the
        reason.
        """
        try:
            size = (path / WEIGHTS_FILE).stat().st_size
        except OSError:
            size = 0
        try:
            if self.residency.used + size > self.residency.capacity:
                return self.register(name, path, pin)
            self.load(name, path, pin)
            return self.entry(name)
        except AdapterError as error:
            return self.fail(name, path, str(error))
        except Exception as error:
            log.exception("adapter %r cannot be loaded", name)
            return self.fail(name, path, f"internal error: {error or type(error).__name__}")

    def fail(self, name: str, path: Path, reason: str) -> Registered:
        """Records that a name cannot be used; one that could goes on with what it had."""
        with self._changing, self._lock:
            old = self._by_name.get(name)
            entry = Registered(name, path, None, reason, signature=signature(path))
            if old is not None and old.content is not None:
                entry = replace(old, reason=reason, signature=entry.signature)
            self._by_name[name] = entry
            return entry

    def unload(self, name: str) -> Registered:
        """Forgets a name. Requests that hold its content keep it until they end.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        with self._changing:
            entry = self.entry(name)
            if entry.is_pinned:
                self._pin(entry, False)
            with self._lock:
                del self._by_name[name]
        self.sweep()
        return entry

    def update(
        self, name: str, pin: bool | None = None, default_scale: float | None = None
    ) -> Registered:
        """Changes how a name is kept and applied; None leaves it as it is.

        Raises:
            UnknownAdapterError: there is no such name.
            AdapterError: it cannot be used, or there is no room to pin it.
            RequestError: its kind cannot be scaled.
        """
        with self._changing:
            old = self.entry(name)
            if old.content is None:
                raise AdapterUnavailableError(f"adapter {name!r} cannot be used: {old.reason}")
            if default_scale is not None:
                old.content.require_scale(name, default_scale)
            new = replace(
                old,
                is_pinned=old.is_pinned if pin is None else pin,
                default_scale=old.default_scale if default_scale is None else default_scale,
            )
            self._switch(old, new)
        self.sweep()
        return new

    def select(self, wanted: Sequence[tuple[str, float | None]]) -> AdapterSelection:
        """The content that names point to now, with scales: what a request holds.

        Args:
            wanted: names with scales, None for a name's default; several make a composition.

        Raises:
            UnknownAdapterError: there is no such name; the message lists those there are.
            AdapterUnavailableError: a name's adapter cannot be used; says why.
            RequestError: a kind of adapter that cannot be scaled or summed in this way.
            AdapterError: they do not fit on the device together.
        """
        parts: list[tuple[SlotKey, int, Any, float]] = []
        with self._lock:
            for name, scale in wanted:
                entry = self.entry(name)
                content = entry.content
                if content is None:
                    raise AdapterUnavailableError(
                        f"adapter {name!r} cannot be used: {entry.reason}"
                    )
                if scale is None:
                    scale = entry.default_scale
                content.require_scale(name, scale)
                if len(wanted) > 1:
                    content.require_sum(name)
                key = self._slot_key(content, scale)
                factor = 1.0 if content.is_dora else scale
                parts.append((key, content.size, content, factor))
            # One order whatever the request's, since the order of sums would show in the last bit.
            parts.sort(key=lambda part: (part[0], part[3]))
            return self.residency.select("+".join(name for name, _ in wanted), parts)

    def resolve(self, name: str) -> AdapterSelection:
        """`select` of one name with its own scale."""
        return self.select([(name, None)])

    def entry(self, name: str) -> Registered:
        """What a name points to now.

        Raises:
            UnknownAdapterError: there is no such name; the message lists those there are.
        """
        with self._lock:
            found = self._by_name.get(name)
            if found is None:
                raise UnknownAdapterError(name, self._by_name)
            return found

    def entries(self) -> list[Registered]:
        """Every name, sorted."""
        with self._lock:
            return [self._by_name[name] for name in sorted(self._by_name)]

    def names(self) -> list[str]:
        """Every name that can be used, sorted."""
        return [entry.name for entry in self.entries() if entry.content is not None]

    def sweep(self) -> None:
        """Drops from memory what no name and no request needs any more."""
        with self._lock:
            named = {e.content.identity for e in self._by_name.values() if e.content is not None}
        wanted = self.residency.sweep(named.__contains__) | named
        self.host.keep_only(wanted.__contains__)

    def close(self) -> None:
        """Ends the loader's thread and the process of templates."""
        self.residency.close()
        if self._templates is not None:
            self._templates.close()

    def _place(
        self, name: str, path: Path, content: AdapterContent, seen: Signature | None, pin: bool
    ) -> Registered:
        """Points a name to a content."""
        reason = self.residency.refusal(content.size)
        if reason is not None:
            raise AdapterError(f"adapter {path} {reason}")
        with self._changing:
            with self._lock:
                old = self._by_name.get(name)
            new = Registered(name, path, content, is_pinned=pin, signature=seen)
            if old is not None:
                scale = 1.0 if content.fixed else old.default_scale
                new = replace(new, default_scale=scale, is_pinned=pin or old.is_pinned)
            self._switch(old, new)
        if old is not None:
            self.sweep()
        return new

    def _switch(self, old: Registered | None, new: Registered) -> None:
        """Puts a new entry in an old one's place, its pin too."""
        if old is not None and old.is_pinned:
            self._pin(old, False)
        try:
            if new.is_pinned:
                self._pin(new, True)
        except AdapterError:
            if old is not None and old.is_pinned:
                self._pin(old, True)
            raise
        with self._lock:
            self._by_name[new.name] = new

    def _pin(self, entry: Registered, is_pinned: bool) -> None:
        content = entry.content
        if content is None:
            return
        key = self._slot_key(content, entry.default_scale)
        others = (e for e in self.entries() if e.name != entry.name and e.is_pinned)
        if not is_pinned and any(
            e.content is not None and self._slot_key(e.content, e.default_scale) == key
            for e in others
        ):
            return  # another name of the same content is pinned too
        self.residency.pin(key, content.size, content, is_pinned)

    def _slot_key(self, content: AdapterContent, scale: float) -> SlotKey:
        return (content.identity, scale if content.is_dora else 1.0)

    def _load_slot(self, slot: Slot) -> tuple[Any, int]:
        """Brings a slot's content to the device; runs in the loader's thread."""
        content: AdapterContent = slot.content
        try:
            with needs_memory(content.path.name):
                weights = self.host.get(content.identity)
                if weights is None:
                    weights = self._read(content)
                resident = self._runner.resident(content.path.name, scaled(weights, slot.key[1]))
            self._keep(weights)
        except AdapterError as error:
            self._note(content.identity, str(error))
            raise
        self._note(content.identity, "")
        return resident, resident.size_bytes

    def _keep(self, weights: AdapterWeights) -> None:
        """Keeps weights in the host's memory that have been put on the device once.

        Without what only had to be compared with the base: an embedding may be larger than all
        the rest.
        """
        self.host.put(replace(weights, base_copies={}))

    def _note(self, identity: str, load_error: str) -> None:
        """Records for listings how loading a content went."""
        with self._lock:
            for name, entry in self._by_name.items():
                if entry.content is not None and entry.content.identity == identity:
                    self._by_name[name] = replace(entry, load_error=load_error)

    def _read(self, content: AdapterContent) -> AdapterWeights:
        """Reads a content from wherever it still is.

        Raises:
            AdapterError: it is gone, or something else has taken its place.
        """
        with self._lock:
            same = [
                e.content.path
                for e in self._by_name.values()
                if e.content is not None and e.content.identity == content.identity
            ]
        failure: AdapterError | None = None
        self._runner.compute_alone()
        for path in dict.fromkeys([content.path, *same]):
            try:
                return read_verified(content, load_weights(read_adapter(path), self._fit))
            except AdapterError as error:
                failure = failure or error
        assert failure is not None
        raise failure
