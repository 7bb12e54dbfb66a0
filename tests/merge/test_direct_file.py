"""Bytes written past the page cache are those that were given, whatever their sizes."""

import errno
import os
import random

import pytest

from qlora_serve.merge.direct_file import BLOCK, Buffer, DirectFile


def _write(path, parts):
    with DirectFile(path) as file:
        offset = 0
        for part in parts:
            buffer = Buffer(len(part))
            buffer.bytes.fill_(255)  # as if it had been used before
            place = buffer.place(offset, len(part))
            place.numpy()[:] = list(part)
            file.write(buffer, len(part))
            offset += len(part)
        file.append(b"end")
        file.finish()


PARTS = [
    [],
    [b"a"],
    [b"x" * BLOCK],
    [b"x" * (BLOCK - 3)],  # what is appended ends the block
    [b"ab", b"", b"c" * (3 * BLOCK + 1), b"d" * (BLOCK - 3), b"e"],
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: str([len(part) for part in parts]))
def test_sizes(tmp_path, parts):
    _write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts) + b"end"


@pytest.mark.parametrize("direct", [True, False])
def test_random_sizes_with_and_without_direct_writes(tmp_path, monkeypatch, direct):
    refused = []
    pwrite = os.pwrite

    def only_cached(descriptor: int, view: memoryview, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct writes here")
        return pwrite(descriptor, view, offset)

    if not direct:
        monkeypatch.setattr(os, "pwrite", only_cached)
    chance = random.Random(1)
    parts = [chance.randbytes(chance.choice([1, 100, BLOCK, 3 * BLOCK + 7])) for _ in range(40)]
    _write(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts) + b"end"
    assert len(refused) <= 1


def test_an_existing_file_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")


def test_other_errors_are_errors(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        _write(tmp_path / "file", [b"x" * BLOCK])
