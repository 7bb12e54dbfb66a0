"""Writing shards from recipes: several threads make rows, and one writes them in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_serve.errors import MergeError
from qlora_serve.merge.direct_file import Buffer, DirectFile
from qlora_serve.merge.recipes import Change, Copied, MadeByPeft, Recipe, RowRecipe
from qlora_serve.merge.tensor_files import (
    HeldTensor,
    PlannedTensor,
    plan_shards,
    shard_header,
    shard_names,
    write_index,
)

# More threads than this only wait for the disk, and each fills a buffer.
_MOST_THREADS = 8
_PIECE_BYTES = 8 * 2**20
# Filled and waiting for the disk, besides those that are being filled.
_SPARE_BUFFERS = 2

OnTensor = Callable[[int], None]


@dataclass(frozen=True)
class _Piece:
    """Some rows of one tensor."""

    tensor: PlannedTensor
    recipe: RowRecipe
    first: int
    rows: int
    offset: int
    """Where in the file they go."""
    size: int
    """In bytes."""


def write_shards(
    folder: Path,
    tensors: dict[PlannedTensor, Recipe],
    limit: int,
    on_tensor: OnTensor,
) -> dict[str, Change]:
    """Writes tensors into files of at most `limit` bytes, with their index, through to the disk.

    Returns:
        Tensor name → how its values changed.

    Raises:
        MergeError: a value is NaN or does not fit the dtype, or PEFT cannot merge a layer.
    """
    shards = plan_shards(tensors, limit)
    changes = {tensor.name: Change() for tensor in tensors}
    done = 0
    with _workers() as (pool, threads):
        buffers = [Buffer(_largest_piece(tensors)) for _ in range(threads + _SPARE_BUFFERS)]
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            with DirectFile(folder / name) as file:
                header = shard_header(shard)
                file.append(header)
                pieces = _pieces(shard, tensors, len(header), changes)
                for piece, buffer, change in _filled(pieces, buffers, pool):
                    file.write(buffer, piece.size)
                    changes[piece.tensor.name].add(change)
                    done += piece.first == 0
                    on_tensor(done)
                file.finish()
    write_index(folder, shards)
    return changes


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that compute, each alone at its own product, and how many there are.

    After an error they are not waited for beyond what they have begun.
    """
    before = torch.get_num_threads()
    threads = min(before, _MOST_THREADS)
    pool = ThreadPoolExecutor(threads)
    torch.set_num_threads(1)
    try:
        yield pool, threads
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _filled(
    pieces: Iterator[_Piece], buffers: list[Buffer], pool: ThreadPoolExecutor
) -> Iterator[tuple[_Piece, Buffer, Change]]:
    """The pieces in order, each made; as many at a time as there are buffers.

    A buffer is used again as soon as the next piece is asked for.
    """
    free = deque(buffers)
    waiting: deque[tuple[_Piece, Buffer, Future[Change]]] = deque()
    for piece in pieces:
        if not free:
            made, buffer, change = waiting.popleft()
            yield made, buffer, change.result()
            free.append(buffer)
        buffer = free.popleft()
        waiting.append((piece, buffer, pool.submit(_make, piece, buffer)))
    for made, buffer, change in waiting:
        yield made, buffer, change.result()


def _largest_piece(tensors: dict[PlannedTensor, Recipe]) -> int:
    # A piece is never one row alone (see `recipes`), and takes a rest of one row with it.
    rows = max(_row_bytes(tensor) for tensor in tensors)
    return max(_PIECE_BYTES, 2 * rows) + rows


def _row_bytes(tensor: PlannedTensor) -> int:
    return tensor.size_bytes // max(1, _row_count(tensor))


def _row_count(tensor: PlannedTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _pieces(
    shard: list[PlannedTensor],
    recipes: dict[PlannedTensor, Recipe],
    offset: int,
    changes: dict[str, Change],
) -> Iterator[_Piece]:
    for tensor in shard:
        recipe = recipes[tensor]
        if isinstance(recipe, MadeByPeft):
            recipe = Copied(HeldTensor(recipe.make(changes[tensor.name])))
        count, row_bytes = _row_count(tensor), _row_bytes(tensor)
        step = max(2, _PIECE_BYTES // max(1, row_bytes))
        first = 0
        while first < count:
            rows = min(step, count - first)
            if count - first - rows == 1:
                rows += 1
            size = rows * row_bytes
            yield _Piece(tensor, recipe, first, rows, offset, size)
            first += rows
            offset += size


def _make(piece: _Piece, buffer: Buffer) -> Change:
    change, dtype = Change(), piece.tensor.dtype
    out = buffer.place(piece.offset, piece.size).view(dtype)
    start = 0
    for block in piece.recipe.blocks(piece.first, piece.rows, change):
        part = out[start : start + block.numel()].view(block.shape)
        part.copy_(block)
        check_fits(piece.tensor.name, block, part)
        start += block.numel()
    assert start == out.numel()
    return change


def check_fits(name: str, tensor: Any, cast: Any) -> None:
    """Checks that a tensor could be cast.

    Raises:
        MergeError: a value is NaN or does not fit.
    """
    if _is_finite(cast):
        return
    dtype, largest = str(cast.dtype).removeprefix("torch."), float(tensor.abs().max())
    raise MergeError(
        f"{name} has values that do not fit into {dtype} (largest {largest:.4g}); use "
        "--dtype bfloat16 or float32"
    )


def _is_finite(tensor: Any) -> bool:
    # The sum passes on any NaN or infinity, at a twentieth of the cost of looking for them; it may
    # be infinite without any.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
