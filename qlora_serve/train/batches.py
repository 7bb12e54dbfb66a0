"""Rows in batches: packed lines, padded or flat, in an order that wastes little."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import Sampler

from qlora_serve.train.dataset import IGNORED, Item
from qlora_serve.train.parallel import rank, world_size

Collate = Callable[[Sequence[Any]], dict[str, torch.Tensor]]

# Rows are sorted by length within a window of this many micro-batches: wide enough to save most of
# the padding, narrow enough that the order stays random.
_WINDOW_BATCHES = 32


def pack(lengths: Sequence[int], line_length: int) -> list[list[int]]:
    """Packs rows into as few lines as best-fit decreasing finds (arXiv:2404.10830).

    Each row goes whole into the fullest line that still has room for it, the longest rows first.

    Args:
        lengths: of the rows, none longer than `line_length`.
        line_length: what a line can hold.

    Returns:
        The indices of each line's rows.
    """
    lines: list[list[int]] = []
    # Lines by the room that they have left; a room is looked up upwards from a row's length.
    by_room: list[list[int]] = [[] for _ in range(line_length + 1)]
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[index]
        room = next((room for room in range(length, line_length) if by_room[room]), None)
        if room is None:
            line, room = len(lines), line_length
            lines.append([])
        else:
            line = by_room[room].pop()
        lines[line].append(index)
        by_room[room - length].append(line)
    return lines


def pad_rows(items: Sequence[Item | Sequence[Item]]) -> dict[str, torch.Tensor]:
    """Pads rows on the right into one batch.

    What is padding is known by its place, never by its token: the padding token is often also the
    end token, which must stay in the loss.

    Returns:
        input_ids, attention_mask and labels, each [rows, longest].
    """
    rows = _rows(items)
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.tensor(row["input_ids"])
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def flat_rows(items: Sequence[Item | Sequence[Item]]) -> dict[str, torch.Tensor]:
    """All rows one after the other in one line, without any padding.

    Positions begin anew with each row, which is how attention tells rows apart. A row's first label
    is never set, so that no row is asked for the beginning of the next.

    Returns:
        input_ids, position_ids and labels, each [1, tokens].
    """
    rows = _rows(items)
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row["input_ids"]))]]),
        "labels": torch.tensor([[label for row in rows for label in row["labels"]]]),
    }


def packed_lines(items: Sequence[Item | Sequence[Item]]) -> dict[str, torch.Tensor]:
    """Each item's rows in a line of their own, padded on the right.

    Returns:
        input_ids, position_ids and labels, each [items, longest]. Padding has positions that begin
        anew, as a row of its own.
    """
    lines = [flat_rows([item]) for item in items]
    shape = (len(lines), max(line["labels"].shape[1] for line in lines))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for index, line in enumerate(lines):
        length = line["labels"].shape[1]
        for name, tensor in line.items():
            batch[name][index, :length] = tensor[0]
        batch["position_ids"][index, length:] = torch.arange(shape[1] - length)
    return batch


def _rows(items: Sequence[Item | Sequence[Item]]) -> list[Item]:
    found: list[Item] = []
    for item in items:
        found += [item] if isinstance(item, dict) else cast("Sequence[Item]", item)
    return found


def own_batches(rows: int, micro_batch: int) -> Iterator[tuple[range, bool]]:
    """This process's share of all rows, as batches, and whether each counts.

    Every process gets as many, since they may have to compute together; those that do not count
    fill up.
    """
    for start in range(0, rows, micro_batch * world_size()):
        first = start + rank() * micro_batch
        if first < rows:
            yield range(first, min(first + micro_batch, rows)), True
        else:
            yield range(1), False


class LengthGroupedSampler(Sampler[int]):
    """Every row once an epoch, in a random order in which a micro-batch's rows are alike in length.

    The order depends on the seed and the epoch alone.
    """

    def __init__(
        self, lengths: Sequence[int], micro_batch: int, seed: int, group: bool = True
    ) -> None:
        """`group` is False for a plain random order."""
        self._lengths = lengths
        self._micro_batch = micro_batch
        self._seed = seed
        self._group = group
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)

        def shuffled(count: int) -> list[int]:
            return cast("list[int]", torch.randperm(count, generator=generator).tolist())

        order = shuffled(len(self._lengths))
        if not self._group:
            yield from order
            return
        batches = []
        window = self._micro_batch * _WINDOW_BATCHES
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: -self._lengths[row])
            batches += [
                rows[i : i + self._micro_batch] for i in range(0, len(rows), self._micro_batch)
            ]
        # An incomplete batch must stay the last one, or it would shift all that follow.
        last = [batches.pop()] if len(batches[-1]) < self._micro_batch else []
        for batch in [batches[i] for i in shuffled(len(batches))] + last:
            yield from batch
