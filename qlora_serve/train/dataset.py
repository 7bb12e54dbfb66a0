"""Tokenized rows, and the batches that are made of them."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler

from qlora_serve.errors import DataError
from qlora_serve.train.data import ChatData
from qlora_serve.train.masks import TokenizedRow, tokenize_row

IGNORED = -100
"""The label of a position that does not count in the loss."""

# Rows are sorted by length within a window of this many micro-batches: wide enough to save most of
# the padding, narrow enough that the order stays random.
_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class DataCounts:
    """What became of a data file's rows and tokens."""

    rows: int
    """Rows that are trained on."""
    tokens: int
    """Their tokens."""
    trained_tokens: int
    """Those that count in the loss."""
    cut_rows: int
    """Rows that were longer than the limit."""
    cut_tokens: int
    """The tokens that they lost."""
    dropped_rows: int
    """Rows in which the cut left nothing to learn."""


class RowDataset(Dataset[Mapping[str, list[int]]], Sized):
    """Tokenized rows as the trainer takes them."""

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        labels = [
            token if counts else IGNORED
            for token, counts in zip(row.input_ids, row.trained, strict=True)
        ]
        # Nothing predicts a row's first token.
        labels[0] = IGNORED
        return {"input_ids": row.input_ids, "labels": labels}


def tokenize_chats(
    data: ChatData, tokenizer: Any, max_length: int, stop_ids: Collection[int]
) -> tuple[list[TokenizedRow], DataCounts]:
    """Tokenizes every row, drops those with nothing to learn, and counts.

    Raises:
        DataError: a row cannot be rendered, with its place in the file, or none is left.
    """
    kept: list[TokenizedRow] = []
    cut_rows = cut_tokens = 0
    for chat in data.rows:
        try:
            row = tokenize_row(tokenizer, chat.messages, max_length, stop_ids)
        except DataError as error:
            raise DataError(f"{chat.where}: {error}") from None
        cut_rows += row.truncated_tokens > 0
        cut_tokens += row.truncated_tokens
        if row.trained_tokens:
            kept.append(row)
    if not kept:
        raise DataError(
            f"{data.path}: nothing is left to learn: all {len(data.rows)} rows were cut to "
            f"{max_length} tokens, before their first answer; raise --max-length"
        )
    counts = DataCounts(
        rows=len(kept),
        tokens=sum(len(row.input_ids) for row in kept),
        trained_tokens=sum(row.trained_tokens for row in kept),
        cut_rows=cut_rows,
        cut_tokens=cut_tokens,
        dropped_rows=len(data.rows) - len(kept),
    )
    return kept, counts


def collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Pads rows on the right into one batch.

    What is padding is known by its place, never by its token: the padding token is often also the
    end token, which must stay in the loss.

    Returns:
        input_ids, attention_mask and labels, each [rows, longest].
    """
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


class LengthGroupedSampler(Sampler[int]):
    """Every row once an epoch, in a random order in which a micro-batch's rows are alike in length.

    The order depends on the seed and the epoch alone.
    """

    def __init__(self, lengths: Sequence[int], micro_batch: int, seed: int) -> None:
        self._lengths = lengths
        self._micro_batch = micro_batch
        self._seed = seed
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
