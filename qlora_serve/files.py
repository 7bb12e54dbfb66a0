"""Writing that appears whole or not at all."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_serve.errors import OutputError, QloraServeError


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
    appear. Everything is flushed to disk before the rename, so that a crash right after it cannot
    leave a name that points to unwritten blocks.

    Raises:
        OutputError: `target` holds something, or the disk is full.
    """
    require_free_output(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with disk_errors(target):
            yield staging
            _flush_tree(staging)
            staging.chmod(0o755)  # mkdtemp makes it private
            # Replaces an empty directory, and fails on one that has been filled meanwhile.
            os.rename(staging, target)
            _flush(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            # safetensors makes its files private too, and a server may run as another user.
            (Path(folder) / name).chmod(0o644)
            _flush(Path(folder) / name)
        _flush(Path(folder))
