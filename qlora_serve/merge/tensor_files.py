"""Safetensors files read and written one tensor at a time, through one buffer.

The library maps a file into memory, where every page that was read counts until the file is closed,
and writes a shard only from memory. Here neither a shard nor a file is ever held.
Format: 8 bytes of header length, a JSON header, the tensors' bytes in its order.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_serve.base.identity import read_header, weight_files
from qlora_serve.base.source import BaseSource

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BLOCK_BYTES = 2 * 2**20
"""How much float32 is computed at once."""


class RowSource(Protocol):
    """A tensor that is given out by rows, wherever it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def rows(
        self, least: int = 1, first: int = 0, count: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Blocks of `count` rows from `first` on, in order: (first row, tensor).

        A block has about `BLOCK_BYTES` of float32, so that what is computed from it stays in the
        processor's cache, and no fewer than `least` rows where there are as many. Each is valid
        until the next is asked for. What has no dimension counts as one row.
        """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    offset: int
    """Where in the file its bytes begin."""
    dtype: str
    """As safetensors names it, such as F32."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def rows(
        self, least: int = 1, first: int = 0, count: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """See `RowSource`; the tensors are in the stored dtype and share one buffer."""
        dtype, width = TORCH_DTYPES[self.dtype], prod(self.shape[1:])
        row_bytes = width * dtype.itemsize
        buffer: bytearray | None = None
        with self.file.open("rb", buffering=0) as stream:
            for start, rows in _steps(self.shape, least, first, count):
                if buffer is None or len(buffer) < rows * row_bytes:
                    buffer = bytearray(rows * row_bytes)
                view = memoryview(buffer)[: rows * row_bytes]
                _fill(stream.fileno(), view, self.offset + start * row_bytes, self.file)
                numbers = torch.frombuffer(buffer, dtype=dtype, count=rows * width)
                yield start, numbers.view((rows, *self.shape[1:]) if self.shape else ())

    def whole(self) -> Any:
        """The tensor, in the stored dtype."""
        blocks = [block for _, block in self.rows(least=_row_count(self.shape))]
        return blocks[0]


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor in memory."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    def rows(
        self, least: int = 1, first: int = 0, count: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """See `RowSource`; the tensors are parts of this one."""
        for start, rows in _steps(self.shape, least, first, count):
            yield start, self.tensor[start : start + rows] if self.shape else self.tensor


def _row_count(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _steps(
    shape: tuple[int, ...], least: int, first: int, count: int | None
) -> Iterator[tuple[int, int]]:
    """The blocks of `RowSource.rows`: (first row, rows)."""
    end = _row_count(shape) if count is None else first + count
    step = max(least, BLOCK_BYTES // max(1, 4 * prod(shape[1:])))
    while first < end:
        rows = min(step, end - first)
        if end - first - rows < least:
            rows = end - first
        yield first, rows
        first += rows


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    dtype: Any
    """A torch dtype."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * int(self.dtype.itemsize)


def stored_tensors(source: BaseSource) -> dict[str, StoredTensor]:
    """Every tensor of a base's weight files."""
    found = {}
    for file in weight_files(source):
        header, start = read_header(file)
        for name, entry in header.items():
            offset = start + entry["data_offsets"][0]
            found[name] = StoredTensor(file, offset, entry["dtype"], tuple(entry["shape"]))
    return found


def plan_shards(tensors: Iterable[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Spreads tensors over files of at most `limit` bytes, in order; a larger one stands alone."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """The files' names, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


def write_index(folder: Path, shards: list[list[PlannedTensor]]) -> None:
    """Writes model.safetensors.index.json, when there is more than one file."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    total = sum(tensor.size_bytes for shard in shards for tensor in shard)
    where = {
        tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def shard_header(shard: list[PlannedTensor]) -> bytes:
    """What stands before the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.size_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Any) -> memoryview:
    """A tensor's bytes in row order."""
    # numpy has no bfloat16: look at any dtype as bytes.
    flat = tensor.detach().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def _fill(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError(f"{file} is cut short")
        view, offset = view[count:], offset + count
