"""Safetensors files read and written one tensor at a time, through one buffer.

The library maps a file into memory, where every page that was read counts until the file is closed,
and writes a shard only from memory. Here neither a shard nor a file is ever held.
Format: 8 bytes of header length, a JSON header, the tensors' bytes in its order.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qlora_serve.base.identity import read_header, weight_files
from qlora_serve.base.source import BaseSource

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BLOCK_BYTES = 2 * 2**20
"""How much is read, computed and written at once."""


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

    def rows(self, least: int = 1) -> Iterator[tuple[int, Any]]:
        """Blocks of rows, in order: (first row, tensor in the stored dtype).

        A block has about `BLOCK_BYTES` of float32, so that what is computed from it stays in the
        processor's cache, and no fewer than `least` rows where the tensor has them. All blocks
        share one buffer: each is valid until the next is asked for.
        """
        dtype = TORCH_DTYPES[self.dtype]
        count = self.shape[0] if self.shape else 1
        width = prod(self.shape[1:])
        step = max(least, BLOCK_BYTES // max(1, 4 * width))
        buffer = bytearray(min(count, step + least - 1) * width * dtype.itemsize)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            first = 0
            while first < count:
                rows = min(step, count - first)
                if count - first - rows < least:
                    rows = count - first
                size = rows * width * dtype.itemsize
                _fill(stream, memoryview(buffer)[:size])
                shape = (rows, *self.shape[1:]) if self.shape else ()
                numbers = torch.frombuffer(buffer, dtype=dtype, count=rows * width)
                yield first, numbers.view(shape)
                first += rows

    def whole(self) -> Any:
        """The tensor, in the stored dtype."""
        blocks = [block for _, block in self.rows(least=self.shape[0] if self.shape else 1)]
        return blocks[0]


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


def _fill(stream: Any, view: memoryview) -> None:
    while view:
        count = stream.readinto(view)
        if not count:
            raise OSError(f"{stream.name} is cut short")
        view = view[count:]
