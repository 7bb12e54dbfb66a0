"""A folder of adapters that cannot be corrupted: names that point to content.

`FOLDER/NAME` is a relative link to `FOLDER/.objects/KEY`, a directory that never changes once it
is there; so a name is replaced by one rename(2), and any tool that reads PEFT directories reads
`FOLDER/NAME`. KEY is the adapter's identity (see `identity`) and a hash of its other files: the
same adapter with another manifest or README is another object, so that nothing written beside the
weights is ever lost to a twin.

Everything is prepared in a directory of `.objects` that its process holds locked, flushed, and
moved into place under the store's lock. Both locks are the kernel's and end with their holder; the
next writer removes what a killed one left.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import WEIGHTS_FILE, AdapterFiles, read_adapter
from qlora_serve.adapters.folder import (
    OBJECT_KEY,
    OBJECTS,
    FolderEntry,
    check_new_name,
    scan_adapters,
)
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.sources import Fill, relabelled
from qlora_serve.adapters.weights import check_finite
from qlora_serve.errors import AdapterError, OutputError, UnknownAdapterError
from qlora_serve.files import (
    dead_staging,
    disk_errors,
    exclusive_lock,
    flush,
    flush_tree,
    held_staging,
)

GRACE_SECONDS = 600.0
"""How long content that no name points to is kept: a server may be loading it at this moment."""

_WORK = "work"
_UNUSED = ".unused"


@dataclass(frozen=True)
class Added:
    """What adding did."""

    entry: FolderEntry
    replaced: bool
    """The name pointed to something else before."""
    unchanged: bool
    """The name pointed to just this before."""
    left_out: tuple[str, ...]
    """Files of the source that are no part of an adapter."""


class AdapterStore:
    """Adapters by name in one folder. Safe with several processes and threads, and against kills.

    Whatever moment a writer is killed at, each name holds its old or its new content, whole. The
    one exception is a plain directory that is replaced with `force`: between two renames its name
    is missing, and the next use of the store puts the old content back.
    """

    def __init__(self, folder: Path, grace_seconds: float = GRACE_SECONDS) -> None:
        self.folder = folder
        self._objects = folder / OBJECTS
        self._grace_seconds = grace_seconds

    def list(self) -> dict[str, FolderEntry]:
        """Every adapter by name; entries that are none are left out (see `scan_adapters`).

        Raises:
            ConfigError: the folder is missing.
        """
        self._heal()
        return scan_adapters(self.folder).entries

    def get(self, name: str) -> FolderEntry:
        """What a name points to now.

        Raises:
            UnknownAdapterError: there is no such name; the message lists those there are.
            ConfigError: the folder is missing.
        """
        entries = self.list()
        if name not in entries:
            raise UnknownAdapterError(name, entries)
        return entries[name]

    def add(
        self, name: str, fill: Fill, label: str, *, replace: bool = False, force: bool = False
    ) -> Added:
        """Takes an adapter into the store under a name.

        Args:
            name: what to call it.
            fill: writes its files; see `sources`.
            label: the source as the user named it, for messages.
            replace: may replace an adapter of that name.
            force: may also replace a plain directory of that name, which is then deleted.

        Raises:
            ConfigError: the name cannot be given.
            AdapterError: the source is no adapter, or its weights are broken.
            OutputError: the name is taken, the disk is full, or the store holds this content
                already, but somebody has changed its files.
        """
        check_new_name(name)
        with self._working() as work:
            adapter = work / "adapter"
            adapter.mkdir()
            left_out = fill(adapter, work)
            key = _seal(adapter, label)
            with self._locked():
                before = self._require_replaceable(name, replace or force, force, key)
                unchanged = before == key
                if (self._objects / key).is_dir():
                    self._require_undamaged(key)
                else:
                    os.rename(adapter, self._objects / key)
                    flush(self._objects)
                if not unchanged:
                    self._point(name, key, work)
                self._collect(work, self._grace_seconds)
        entry = FolderEntry(name, self._objects / key, key, is_managed=True)
        replaced = before is not None and not unchanged
        return Added(entry, replaced, unchanged, tuple(left_out))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Takes a name out of the store; its content follows when the grace is over.

        Raises:
            UnknownAdapterError: there is no such name.
            OutputError: it is a plain directory, and `force` is not set; with it, it is deleted.
        """
        with self._working() as work, self._locked():
            entry = self._require(name, force, "removed")
            if (self.folder / name).is_symlink():
                (self.folder / name).unlink()
            else:
                trash = work / "trash"
                trash.mkdir()
                os.rename(entry.path, trash / name)
            flush(self.folder)
            self._collect(work, self._grace_seconds)

    def rename(
        self, old: str, new: str, *, replace: bool = False, force: bool = False
    ) -> FolderEntry:
        """Gives an adapter another name, in one step.

        Raises:
            UnknownAdapterError: there is no `old`.
            ConfigError: `new` cannot be given.
            OutputError: `new` is taken and `replace` is not set, or one of them is a plain
                directory and `force` is not set.
        """
        check_new_name(new)
        with self._working() as work, self._locked():
            self._require(old, force, "renamed")
            if old != new:
                # Two names of one object are two links: rename(2) replaces one by the other.
                taken = self._require_replaceable(new, replace or force, force, key=None)
                if taken is not None and not (
                    (self.folder / new).is_symlink() and (self.folder / old).is_symlink()
                ):
                    raise OutputError(
                        f"{self.folder / new} is a plain directory, or would be replaced by one; "
                        f"remove it first with `qlora-serve adapters remove {new} --force`"
                    )
                os.rename(self.folder / old, self.folder / new)
                flush(self.folder)
            self._collect(work, self._grace_seconds)
        return self.get(new)

    def clean(self, grace_seconds: float | None = None) -> int:
        """Removes content that no name points to, and what killed processes left.

        Args:
            grace_seconds: how long such content is kept; the store's own when left out.

        Returns:
            How many adapters' content was removed.
        """
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        with self._working() as work, self._locked():
            return self._collect(work, grace)

    @contextmanager
    def _working(self) -> Iterator[Path]:
        """A directory of this operation's own, on the store's file system."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._objects.is_symlink():
                raise OutputError(
                    f"{self._objects} is a symbolic link; a store keeps its content inside itself"
                )
            self._objects.mkdir(exist_ok=True)
            with held_staging(self._objects, _WORK) as work:
                yield work

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with exclusive_lock(self._objects / ".lock"):
            self._restore()
            yield

    def _heal(self) -> None:
        """Puts back what a killed process had moved away, if there is any such thing."""
        if next(self._objects.glob(f".{_WORK}.*/old/*"), None) is not None:
            with self._working(), self._locked():
                pass

    def _restore(self) -> None:
        """Removes what dead processes left, and puts plain directories back under their names."""
        for work in dead_staging(self._objects, _WORK):
            for old in (work / "old").iterdir() if (work / "old").is_dir() else ():
                if not os.path.lexists(self.folder / old.name):
                    os.rename(old, self.folder / old.name)
                    flush(self.folder)

    def _require_undamaged(self, key: str) -> None:
        """Checks that content which is there already is still what its name says."""
        content = self._objects / key
        try:
            is_whole = _key_of(content, *_read_whole(content)) == key
        except AdapterError:
            is_whole = False
        if is_whole:
            return
        entries = scan_adapters(self.folder).entries.values()
        names = [entry.name for entry in entries if entry.path == content]
        remove = f"remove {', '.join(names)} with `qlora-serve adapters remove`, " if names else ""
        raise OutputError(
            f"{self.folder} already holds this adapter, but damaged: its files in the store have "
            f"changed since it was added; {remove}run `qlora-serve adapters clean --now`, and add "
            "it again"
        )

    def _require(self, name: str, force: bool, what: str) -> FolderEntry:
        entries = scan_adapters(self.folder).entries
        if name not in entries:
            raise UnknownAdapterError(name, entries)
        entry = entries[name]
        if not entry.is_managed and not force:
            raise OutputError(
                f"{self.folder / name} is unmanaged: it was put there by hand, not by `qlora-serve "
                f"adapters add`; it is {what} only with --force"
            )
        return entry

    def _require_replaceable(
        self, name: str, replace: bool, force: bool, key: str | None
    ) -> str | None:
        """What stands under a name: None for nothing, else its key or `plain`."""
        path = self.folder / name
        if not os.path.lexists(path):
            return None
        entry = scan_adapters(self.folder).entries.get(name)
        if entry is not None and entry.is_managed:
            if entry.path.name != key and not replace:
                raise OutputError(
                    f"{self.folder} already has an adapter {name!r}; pass --replace, or choose "
                    "another name"
                )
            return entry.path.name
        if entry is None:
            raise OutputError(f"{path} is there and is no adapter; choose another name")
        if not force:
            raise OutputError(
                f"{path} is unmanaged: it was put there by hand; with --force it is deleted and "
                "replaced"
            )
        return "plain"

    def _point(self, name: str, key: str, work: Path) -> None:
        """Makes a name point to an object, in one rename."""
        path, link, old = self.folder / name, work / "link", work / "old"
        link.symlink_to(f"{OBJECTS}/{key}")
        if path.is_dir() and not path.is_symlink():
            old.mkdir()
            flush(work)
            os.rename(path, old / name)
        try:
            os.rename(link, path)
        except BaseException:
            if (old / name).is_dir():
                os.rename(old / name, path)
            raise
        flush(self.folder)

    def _collect(self, work: Path, grace_seconds: float) -> int:
        """Removes objects that have had no name for longer than the grace."""
        used = self._used_keys()
        names = set(os.listdir(self._objects))
        removed = 0
        for mark in (name for name in names if name.endswith(_UNUSED)):
            key = mark.removesuffix(_UNUSED)
            if key in used or key not in names:
                (self._objects / mark).unlink(missing_ok=True)
        for key in sorted(names - used):
            if not OBJECT_KEY.fullmatch(key):
                continue
            mark_file = self._objects / (key + _UNUSED)
            if not mark_file.exists():
                mark_file.touch()
            if time.time() - mark_file.stat().st_mtime >= grace_seconds:
                os.rename(self._objects / key, work / key)  # deleted when the lock is free again
                mark_file.unlink()
                removed += 1
        return removed

    def _used_keys(self) -> set[str]:
        """The objects that any link of the folder leads to, whatever its name."""
        root = self._objects.resolve()
        with os.scandir(self.folder) as listing:
            links = [Path(item.path) for item in listing if item.is_symlink()]
        ends = (Path(os.path.realpath(link)) for link in links)
        return {end.name for end in ends if end.parent == root}


def _seal(adapter: Path, label: str) -> str:
    """Checks a directory that will be an object, brings it to its final form, and names it."""
    files, tensors = relabelled(lambda: _read_whole(adapter), adapter, label)
    if len(files.weight_files) > 1:
        _write_single_file(adapter, tensors, files.weight_files)
    flush_tree(adapter)
    return _key_of(adapter, files, tensors)


def _key_of(adapter: Path, files: AdapterFiles, tensors: dict[str, Any]) -> str:
    """The name of an object with this content."""
    identity = content_identity(files, tensors)
    return f"{identity.removeprefix('sha256:')}-{_hash_of_others(adapter)}"


def _read_whole(adapter: Path) -> tuple[AdapterFiles, dict[str, Any]]:
    files = read_adapter(adapter)
    kind = files.config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{adapter}: peft_type is {kind!r}; only LORA adapters can be applied")
    tensors = files.load_tensors()
    check_finite(files, tensors)
    return files, tensors


def _write_single_file(adapter: Path, tensors: dict[str, Any], shards: tuple[Path, ...]) -> None:
    """PEFT and vLLM read no shards."""
    from safetensors.torch import save_file

    save_file(tensors, adapter / WEIGHTS_FILE, {"format": "pt"})
    for shard in shards:
        shard.unlink()


def _hash_of_others(adapter: Path) -> str:
    """A hash of every file but the weights, which the identity covers."""
    digest = hashlib.sha256()
    for file in sorted(adapter.iterdir()):
        if file.name != WEIGHTS_FILE:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:16]
