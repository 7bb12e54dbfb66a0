"""Where an adapter may come from: a directory, an archive, a hub."""

import importlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qlora_serve.adapters.archive import SUFFIXES, is_archive, unpack
from qlora_serve.adapters.files import (
    CONFIG_FILE,
    INDEX_FILES,
    PICKLE_SUFFIXES,
    AdapterFiles,
    read_adapter,
)
from qlora_serve.errors import AdapterError

DEFAULT_MAX_BYTES = 4 << 30
MODELSCOPE = "modelscope:"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
# Files of a hub's repository that an adapter may consist of: never a pickle.
_HUB_FILES = ["*.json", "*.safetensors", "*.md", "*.jinja", "*.model", "*.txt"]
# The trainer's own state, for going on with training.
_TRAINER_STATE = ("trainer_state.json", "zero_to_fp32.py", "latest")

ResultT = TypeVar("ResultT")
Fill = Callable[[Path, Path], list[str]]
"""Writes an adapter's files into the first directory, with the second one for scratch, and returns
the names of files that it left out."""


def find_source(source: str, max_bytes: int = DEFAULT_MAX_BYTES) -> Fill:
    """How to get what the user named: a function that fills a directory.

    Args:
        source: a directory, an archive's file, `org/name[@revision]` on the Hugging Face hub, or
            `modelscope:org/name[@revision]`.
        max_bytes: what an archive may unpack to.

    Raises:
        AdapterError: it is none of these.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return lambda adapter, _: copy_adapter(path, adapter)
    if path.is_file():
        if not is_archive(path):
            raise AdapterError(
                f"{source} is a file; expected an adapter's directory or an archive "
                f"({', '.join(SUFFIXES)})"
            )
        return partial(_from_archive, path, max_bytes)
    name = source.removeprefix(MODELSCOPE)
    if _HUB_ID.fullmatch(name):
        fetch = _from_modelscope if source.startswith(MODELSCOPE) else _from_hugging_face
        return partial(_from_hub, source, fetch)
    raise AdapterError(
        f"no adapter at {source!r}: no such directory or archive, and not a hub id like 'org/name' "
        f"or '{MODELSCOPE}org/name'"
    )


def copy_adapter(source: Path, into: Path, weights_required: bool = True) -> list[str]:
    """Copies an adapter's files, without what a trainer left beside them.

    Args:
        source: a directory with an adapter, such as a trainer's `checkpoint-N`.
        into: an empty directory.
        weights_required: whether it must hold safetensors; without, everything else is copied.

    Returns:
        The names of files that are no part of an adapter.

    Raises:
        AdapterError: it is no adapter, or holds a symbolic link that leads out of it.
    """
    root = _link_root(source)
    check_links(source, root)
    adapter = read_adapter(source) if weights_required else None
    left_out = []
    for file in sorted(source.iterdir()):
        if file.name.startswith("."):
            continue
        if _belongs(file, adapter):
            shutil.copyfile(file, into / file.name)
        elif not (file.name in INDEX_FILES and adapter is not None):
            left_out.append(file.name)
    return left_out


def check_links(source: Path, root: Path | None = None) -> None:
    """Checks that nothing in an adapter's directory leads out of it.

    Raises:
        AdapterError: a symbolic link leads elsewhere; the first is named.
    """
    allowed = (root or source).resolve()
    for file in sorted(source.iterdir()):
        if file.is_symlink() and not file.resolve().is_relative_to(allowed):
            raise AdapterError(
                f"{file} is a symbolic link to {os.readlink(file)}, out of {source}; replace it "
                "with the file itself, if you trust where that comes from"
            )


def _link_root(source: Path) -> Path:
    """What links may lead into: the directory itself, or the hub's cache that it is part of."""
    real = source.resolve()
    repository = real.parent.parent
    # In the hub's cache, snapshots/REVISION/FILE is a link to ../../blobs/HASH.
    if real.parent.name == "snapshots" and (repository / "blobs").is_dir():
        return repository
    return real


def _belongs(file: Path, adapter: AdapterFiles | None) -> bool:
    if not stat.S_ISREG(file.stat().st_mode) or file.name in _TRAINER_STATE:
        return False
    if file.suffix == ".safetensors":
        return adapter is not None and file.name in {part.name for part in adapter.weight_files}
    # An index would name shards that the store brings into one file.
    return file.suffix not in PICKLE_SUFFIXES and file.name not in INDEX_FILES


def _from_archive(archive: Path, max_bytes: int, adapter: Path, scratch: Path) -> list[str]:
    found = adapter_in_archive(archive, max_bytes, scratch)
    return relabelled(lambda: copy_adapter(found, adapter), found, str(archive))


def adapter_in_archive(archive: Path, max_bytes: int, scratch: Path) -> Path:
    """Unpacks an archive below `scratch` and gives the one adapter's directory in it.

    Raises:
        AdapterError: it cannot be unpacked (see `archive.unpack`), or does not hold one adapter.
    """
    unpacked = scratch / "unpacked"
    unpacked.mkdir()
    unpack(archive, unpacked, max_bytes)
    found = sorted(file.parent for file in unpacked.rglob(CONFIG_FILE) if file.is_file())
    if not found:
        raise AdapterError(f"{archive} holds no {CONFIG_FILE}, so there is no PEFT adapter in it")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(unpacked)) for path in found[:3])
        raise AdapterError(
            f"{archive} holds {len(found)} adapters ({names}); unpack it and add them one by one"
        )
    return found[0]


def _from_hub(
    source: str, fetch: Callable[[str, str | None, Path], None], adapter: Path, scratch: Path
) -> list[str]:
    name, _, revision = source.removeprefix(MODELSCOPE).partition("@")
    fetched = scratch / "fetched"
    fetch(name, revision or None, fetched)
    if not (fetched / CONFIG_FILE).is_file():
        raise AdapterError(f"{source} holds no {CONFIG_FILE}, so it is not a PEFT adapter")
    if not any(fetched.glob("*.safetensors")):
        raise AdapterError(
            f"{source} holds no safetensors; if it holds pickled weights, download it yourself and "
            "convert it with `qlora-serve adapters convert DIR NEW_DIR`"
        )
    return relabelled(lambda: copy_adapter(fetched, adapter), fetched, source)


def _from_hugging_face(name: str, revision: str | None, into: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, local_dir=into)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AdapterError(
            f"no adapter at {name!r}: no such directory or archive, and the hub does not give it "
            f"({_first_line(error)})"
        ) from None


def _from_modelscope(name: str, revision: str | None, into: Path) -> None:
    try:
        modelscope: Any = importlib.import_module("modelscope")
    except ImportError:
        raise AdapterError(
            f"{MODELSCOPE}{name} needs the package modelscope; `pip install modelscope` and try "
            "again"
        ) from None
    try:
        modelscope.snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, local_dir=str(into)
        )
    except Exception as error:  # its errors have no common class
        raise AdapterError(f"ModelScope does not give {name!r} ({_first_line(error)})") from None


def relabelled(work: Callable[[], ResultT], path: Path, label: str) -> ResultT:
    """Runs `work` so that its errors speak of what the user named, not of where that lies."""
    try:
        return work()
    except AdapterError as error:
        text = str(error).replace(str(path.resolve()), label).replace(str(path), label)
        raise AdapterError(text) from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
