"""A folder of adapters: each entry is one, and its name is the adapter's name.

An entry is a link into the store's `.objects` (see `store`), or a plain directory that somebody
put there.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from qlora_serve.adapters.manifest import MANIFEST_FILE
from qlora_serve.errors import ConfigError
from qlora_serve.settings import as_mapping

OBJECTS = ".objects"
"""The hidden directory of a store's content; see `store.AdapterStore`."""
OBJECT_KEY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}")
"""A directory in it: the adapter's identity, and a hash of its files but for the weights."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_RESERVED = ("base",)


def check_name(name: str) -> str:
    """Returns `name` when it can name an adapter.

    Raises:
        ConfigError: it is empty, too long, or has a character that does not fit in a URL.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name an adapter; use letters, digits, '.', '_', ':' and '-', "
            "at most 128, beginning with a letter or digit"
        )
    return name


def check_new_name(name: str) -> str:
    """Returns `name` when it can be given to an adapter.

    Raises:
        ConfigError: it cannot name one, or already means something else.
    """
    if check_name(name).lower() in _RESERVED:
        raise ConfigError(f"{name!r} means the base model in every request; choose another name")
    return name


@dataclass(frozen=True)
class FolderEntry:
    """A name in a folder of adapters, and what it points to at this moment."""

    name: str
    path: Path
    """What to load. Of a managed one the content itself, not the name: a replacement meanwhile
    does not mix the old and the new."""
    signature: str
    """Changes whenever the content may have changed; two equal ones mean the same content."""
    is_managed: bool
    """Whether the store keeps it; otherwise somebody put a plain directory there."""

    @property
    def identity(self) -> str | None:
        """The identity of a managed adapter, from where it lies; None means: read it."""
        return f"sha256:{self.path.name[:64]}" if self.is_managed else None


@dataclass(frozen=True)
class FolderScan:
    """What a folder of adapters holds."""

    entries: dict[str, FolderEntry]
    """By name, sorted."""
    refused: dict[str, str]
    """Name → why this entry, which looks like an adapter, is not one."""


def scan_adapters(folder: Path) -> FolderScan:
    """Looks at a folder of adapters without opening a file of them.

    Cheap enough to poll: one scandir, and a readlink for each managed adapter or a few lstat for a
    plain one. Hidden entries are the store's own, or adapters that are still being written.

    Raises:
        ConfigError: the folder is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder of adapters at {folder}")
    entries: dict[str, FolderEntry] = {}
    refused: dict[str, str] = {}
    with os.scandir(folder) as listing:
        found = sorted(listing, key=lambda item: item.name)
    for item in found:
        if item.name.startswith("."):
            continue
        try:
            entry = _look_at(folder, item)
            if entry is not None:
                entries[check_name(item.name)] = entry
        except ConfigError as error:
            refused[item.name] = str(error)
        except OSError:
            continue  # it went away while we looked
    return FolderScan(entries, refused)


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder, by name: `folder/NAME`, which is the current content at all times.

    Raises:
        ConfigError: the folder is missing, a directory's name cannot name an adapter, or a link
            leads out of the folder.
    """
    scan = scan_adapters(folder)
    for reason in scan.refused.values():
        raise ConfigError(reason)
    return {name: folder / name for name in scan.entries}


def _look_at(folder: Path, item: os.DirEntry[str]) -> FolderEntry | None:
    """None when the entry is no adapter."""
    path = Path(item.path)
    if item.is_symlink():
        target = os.readlink(path)
        stem, slash, key = target.rstrip("/").partition("/")
        if stem == OBJECTS and slash and OBJECT_KEY.fullmatch(key):
            return FolderEntry(item.name, folder / OBJECTS / key, key, True)
        if not (path / CONFIG_FILE).exists():
            return None
        real, root = path.resolve(), folder.resolve()
        if not real.is_relative_to(root):
            raise ConfigError(
                f"{path} is a symbolic link to {target}, out of {folder}; add what it points to "
                f"with `qlora-serve adapters add {item.name} {real}`"
            )
        if real.parent == root / OBJECTS and OBJECT_KEY.fullmatch(real.name):
            return FolderEntry(item.name, folder / OBJECTS / real.name, real.name, True)
        path = real
    elif not item.is_dir(follow_symlinks=False):
        return None
    signature = _plain_signature(folder, path)
    return None if signature is None else FolderEntry(item.name, path, signature, False)


def _plain_signature(folder: Path, path: Path) -> str | None:
    """Which files these are, and of when; None when there is no config."""
    parts = []
    for name in (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE):
        file = path / name
        try:
            status = file.lstat()
        except FileNotFoundError:
            if name == CONFIG_FILE:
                return None
            parts.append("-")
            continue
        if stat.S_ISLNK(status.st_mode):
            if not file.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"{file} is a symbolic link to {os.readlink(file)}, out of {folder}; copy the "
                    "file itself there"
                )
            status = file.stat()
        parts.append(f"{status.st_ino}.{status.st_size}.{status.st_mtime_ns}")
    # The directory's own time shows what was added or renamed in it, shards for instance.
    return "-".join([*parts, str(path.lstat().st_mtime_ns)])


def named_paths(value: Any) -> Any:
    """Adapters given as `NAME=DIR`; see `as_mapping`."""
    return as_mapping(value, str.partition, "NAME=DIR, such as tagging=adapters/tagging")
