"""Unpacking an archive that may come from anywhere.

Only files and directories below the destination are written, and only as many bytes as allowed,
counted while they come out: what an archive says of itself is not believed.
"""

import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from qlora_serve.errors import AdapterError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_FILES = 10_000
_CHUNK = 1 << 20
# tarfile reads a member's extended header into memory at once; real ones are a few hundred bytes.
_MAX_HEADER = 1 << 20
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    gzip.BadGzipFile,
    NotImplementedError,  # a compression that zipfile does not know
    UnicodeError,
)


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of an archive that can be unpacked."""
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, into: Path, max_bytes: int) -> None:
    """Unpacks an archive into an empty directory.

    Raises:
        AdapterError: it is broken, too large, or holds something that is no plain file below it:
            an absolute path, `..`, a link, a device, a name twice. Nothing outside `into` was
            written.
    """
    budget = _Budget(archive, max_bytes)
    reader: Callable[[Path, Path, _Budget], None]
    reader = _unpack_zip if archive.name.lower().endswith(".zip") else _unpack_tar
    try:
        reader(archive, into, budget)
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AdapterError(f"{archive} cannot be unpacked: {reason}") from None


class _Budget:
    """Counts files and real bytes."""

    def __init__(self, archive: Path, max_bytes: int) -> None:
        self.archive = archive
        self.max_bytes = max_bytes
        self._files = 0
        self._bytes = 0

    def count_file(self) -> None:
        self._files += 1
        if self._files > MAX_FILES:
            raise AdapterError(f"{self.archive} holds more than {MAX_FILES} files; not unpacked")

    def count_bytes(self, size: int) -> None:
        self._bytes += size
        self.check(self._bytes)

    def check(self, size: int) -> None:
        if size > self.max_bytes:
            raise AdapterError(
                f"{self.archive} unpacks to more than {self.max_bytes} bytes; if it is meant to, "
                "raise --max-unpacked-size"
            )


def _unpack_zip(archive: Path, into: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            budget.count_file()
            # Zip files made on Unix keep the file's type in the upper half.
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _no_plain_file(archive, info.filename, kind == stat.S_IFLNK)
            if info.flag_bits & 1:
                raise AdapterError(f"{archive} is encrypted; decrypt it first")
            target = _target(archive, into, info.filename)
            if info.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with opened.open(info) as stream:
                _write(archive, stream, target, budget)


def _unpack_tar(archive: Path, into: Path, budget: _Budget) -> None:
    opener: Any = open if archive.name.lower().endswith(".tar") else gzip.open
    guarded: Any = partial(_Guarded, budget=budget)
    with opener(archive, "rb") as raw, tarfile.open(fileobj=guarded(raw), mode="r:") as tar:
        for member in tar:
            budget.count_file()
            if member.isdir():
                _target(archive, into, member.name).mkdir(parents=True, exist_ok=True)
                continue
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None:
                raise _no_plain_file(archive, member.name, member.issym() or member.islnk())
            with stream:
                _write(archive, stream, _target(archive, into, member.name), budget)


class _Guarded:
    """A file that tarfile reads from, which is refused outsized headers and endless padding."""

    def __init__(self, stream: Any, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_HEADER:
            raise AdapterError(
                f"{self._budget.archive} has a header of {size} bytes; it is no honest archive"
            )
        data: bytes = self._stream.read(size)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        # Headers and padding count half a file each in an honest archive of many small files.
        self._budget.check(position - 2 * MAX_FILES * tarfile.BLOCKSIZE)
        return int(self._stream.seek(position, whence))

    def tell(self) -> int:
        return int(self._stream.tell())


def _target(archive: Path, into: Path, name: str) -> Path:
    """Where a member goes: below `into`, or nowhere."""
    parts = PurePosixPath(name).parts
    is_outside = name.startswith("/") or ".." in parts
    # Windows' separators and drives mean nothing here, and would mean something elsewhere.
    if is_outside or "\\" in name or "\0" in name or name[1:2] == ":":
        raise AdapterError(
            f"{archive} holds {name!r}, a path that leads out of it; it is not unpacked"
        )
    return into.joinpath(*parts)


def _write(archive: Path, stream: IO[bytes], target: Path, budget: _Budget) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as output:
            while chunk := stream.read(_CHUNK):
                budget.count_bytes(len(chunk))
                output.write(chunk)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise AdapterError(f"{archive} holds {target.name!r} twice; it is not unpacked") from None


def _no_plain_file(archive: Path, name: str, is_link: bool) -> AdapterError:
    kind = "a link" if is_link else "a device or another special file"
    return AdapterError(f"{archive} holds {kind}, {name!r}; only plain files are unpacked")
