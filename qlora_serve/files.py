"""Writing that appears whole or not at all."""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_serve.errors import OutputError, QloraServeError

# Ends the name of a directory that is still being filled; its holder keeps a lock on it.
STAGING_SUFFIX = ".partial"
_LOCK_POLL_SECONDS = 0.02


def require_free_output(path: Path) -> None:
    """Checks, before any work is done, that `path` can become a new directory.

    Raises:
        OutputError: something that is not an empty directory is already there.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise OutputError(
            f"{path} already holds something; name another output directory or remove this one"
        )


@contextmanager
def published_directory(target: Path) -> Iterator[Path]:
    """Gives a hidden sibling directory to fill; on success it becomes `target` in one rename.

    On any exception, KeyboardInterrupt included, the sibling is removed and `target` does not
    appear; what a killed process left is removed by the next one that writes the same target.
    Everything is flushed to disk before the rename, so that a crash right after it cannot leave a
    name that points to unwritten blocks.

    Raises:
        OutputError: `target` holds something, or the disk is full.
    """
    require_free_output(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in dead_staging(target.parent, target.name):
            pass
        with held_staging(target.parent, target.name) as staging:
            yield staging
            flush_tree(staging)
            # Replaces an empty directory, and fails on one that has been filled meanwhile.
            os.rename(staging, target)
            flush(target.parent)


@contextmanager
def held_staging(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden directory in `parent` that is locked as long as this process lives.

    It is removed at the end, unless it was renamed. The lock is the kernel's (flock), so that it
    ends with its holder however that dies, and needs no process numbers, which are reused.
    """
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=STAGING_SUFFIX, dir=parent))
        try:
            descriptor: int | None = _lock_directory(staging)
        except (BlockingIOError, FileNotFoundError):
            continue  # between its making and its locking another process took it for dead
        except OSError:
            descriptor = None  # no locks on this file system: then nobody removes it as dead either
        if staging.is_dir():
            break
        _close(descriptor)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _close(descriptor)


def dead_staging(parent: Path, name: str) -> Iterator[Path]:
    """The directories of `held_staging` whose process is dead; each is removed after its turn."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(STAGING_SUFFIX)}")
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if not pattern.fullmatch(path.name):
            continue
        try:
            descriptor = _lock_directory(path)
        except OSError:
            continue  # its process lives, or somebody else is removing it
        try:
            yield path
            shutil.rmtree(path, ignore_errors=True)
        finally:
            _close(descriptor)


@contextmanager
def exclusive_lock(file: Path, wait_seconds: float = 60.0) -> Iterator[None]:
    """Holds a lock file; the lock ends with its holder, and the file stays.

    Raises:
        OutputError: another process held it all that time, or the file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"another process has held {file} for {wait_seconds:g} s; see which with "
                        f"`fuser {file}`, and try again"
                    ) from None
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError as error:
                raise OutputError(
                    f"{file} cannot be locked ({error.strerror}); use a file system that has "
                    "locks (flock)"
                ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into an OutputError that names `target`."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file grew past the limit on file sizes (ulimit -f)",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission is denied",
        errno.ENOTEMPTY: "something else was written there meanwhile",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0)
        if reason is None:
            raise
        raise OutputError(f"cannot write {target}: {reason}; nothing was published") from error
    except Exception as error:  # safetensors and tokenizers wrap the OS error in their own types
        code = re.search(r"os error (\d+)", str(error))
        reason = reasons.get(int(code[1])) if code is not None else None
        if reason is None and ("No space left" in str(error) or "StorageFull" in str(error)):
            reason = reasons[errno.ENOSPC]
        if reason is None or isinstance(error, QloraServeError):
            raise
        raise OutputError(f"cannot write {target}: {reason}; nothing was published") from error


def flush(path: Path) -> None:
    """Writes a file, or the names in a directory, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(root: Path) -> None:
    """Makes a directory readable for everyone, as other output is, and flushes all of it."""
    for folder, _, files in os.walk(root):
        for name in files:
            # safetensors makes its files private too, and a server may run as another user.
            (Path(folder) / name).chmod(0o644)
            flush(Path(folder) / name)
        Path(folder).chmod(0o755)  # mkdtemp makes it private
        flush(Path(folder))


def _lock_directory(path: Path) -> int:
    """Raises:
    BlockingIOError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
