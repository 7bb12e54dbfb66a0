"""Tokenized rows, all at once or one by one."""

from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset

from qlora_serve.errors import DataError
from qlora_serve.train.data import ChatData, ChatRow
from qlora_serve.train.data_settings import TrainOn
from qlora_serve.train.masks import TokenizedRow, prompt_ids, tokenize_chat, tokenize_text
from qlora_serve.train.sources import Problem
from qlora_serve.train.token_cache import TokenCache
from qlora_serve.wording import counted

IGNORED = -100
"""The label of a position that does not count in the loss."""

# About four characters of prose make a token; only the order of rows in lazy mode rests on it.
_CHARACTERS_PER_TOKEN = 4

Item = Mapping[str, list[int]]
"""A row's `input_ids` and `labels`, of equal length."""


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
    split_chats: int = 0
    """Chats that became a row for each answer, since the template rewrites earlier turns."""


@dataclass(frozen=True)
class TokenizeSettings:
    """All that decides how a row becomes tokens, next to the row itself."""

    tokenizer: Any
    max_length: int
    stop_ids: Collection[int]
    train_on: TrainOn = "assistant"

    def rows_of(self, chat: ChatRow) -> list[TokenizedRow]:
        """The rows that a chat becomes; most become one.

        Raises:
            DataError: the chat cannot be rendered, or has no tokens that `train_on` asks for.
        """
        if chat.text is not None:
            if self.train_on in ("prompt", "last"):
                raise DataError(
                    f"a text that was already templated has no turns, so train_on {self.train_on} "
                    "cannot be told; use all, or give the rows as chats"
                )
            return [tokenize_text(self.tokenizer, chat.text, self.max_length)]
        return tokenize_chat(
            self.tokenizer, chat.messages, self.max_length, self.stop_ids, self.train_on, chat.tools
        )


def probe_ids(tokenizer: Any, chat: ChatRow) -> list[int]:
    """The tokens of a row's prompt, or of a templated text."""
    if chat.text is not None:
        return tokenize_text(tokenizer, chat.text, max_length=1 << 30).input_ids
    return prompt_ids(tokenizer, chat.messages, chat.tools)


@dataclass
class TokenizedData:
    """Every row of some data, tokenized."""

    rows: list[TokenizedRow] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    """For each row, which of the data's rows it came from."""
    problems: list[Problem] = field(default_factory=list)

    def kept(self) -> list[TokenizedRow]:
        """The rows with something to learn."""
        return [row for row in self.rows if row.trained_tokens]

    def counts(self) -> DataCounts:
        """What became of them."""
        kept = self.kept()
        several = {a for a, b in zip(self.origins, self.origins[1:], strict=False) if a == b}
        return DataCounts(
            rows=len(kept),
            tokens=sum(len(row.input_ids) for row in kept),
            trained_tokens=sum(row.trained_tokens for row in kept),
            cut_rows=sum(row.truncated_tokens > 0 for row in self.rows),
            cut_tokens=sum(row.truncated_tokens for row in self.rows),
            dropped_rows=len(self.rows) - len(kept),
            split_chats=len(several),
        )


def tokenize_data(
    chats: Sequence[ChatRow], settings: TokenizeSettings, cache: TokenCache | None = None
) -> TokenizedData:
    """Tokenizes rows, or takes them from the cache; rows that cannot be rendered are problems."""
    key = ""
    if cache is not None:
        key = cache.key(
            (chat.content_key() for chat in chats),
            settings.tokenizer,
            [settings.max_length, sorted(settings.stop_ids), settings.train_on],
        )
        stored = cache.read(key)
        if stored is not None:
            return TokenizedData(*stored)
    made = TokenizedData()
    for index, chat in enumerate(chats):
        try:
            rows = settings.rows_of(chat)
        except DataError as error:
            made.problems.append(Problem(f"{chat.where}:", str(error)))
            continue
        made.rows += rows
        made.origins += [index] * len(rows)
    if cache is not None and not made.problems:
        cache.write(key, made.rows, made.origins)
    return made


def tokenize_usable(
    data: ChatData, settings: TokenizeSettings, cache: TokenCache | None = None
) -> TokenizedData:
    """Tokenizes data of which every row must be usable.

    Raises:
        DataError: a row cannot be rendered, with its place in the file, or none is left to learn
            from.
    """
    made = tokenize_data(data.rows, settings, cache)
    if made.problems:
        first, *others = made.problems
        count = counted(len(others), "more row", "more rows")
        more = f" ({count} cannot be rendered; `data check` lists them)"
        raise DataError(f"{first}{more if others else ''}")
    if not made.kept():
        raise DataError(
            f"{data.name}: nothing is left to learn: all {len(data.rows)} rows were cut to "
            f"{settings.max_length} tokens, before their first answer; raise --max-length"
        )
    return made


def as_item(row: TokenizedRow) -> dict[str, list[int]]:
    """A row as the collators take it, as far as the last token that counts.

    What comes after that token changes neither the loss nor a gradient: no token sees a later one.
    """
    pairs = zip(row.input_ids, row.trained, strict=True)
    labels = [token if counts else IGNORED for token, counts in pairs]
    while len(labels) > 1 and labels[-1] == IGNORED:
        labels.pop()
    # Nothing predicts a row's first token.
    labels[0] = IGNORED
    return {"input_ids": row.input_ids[: len(labels)], "labels": labels}


class RowDataset(Dataset[Any], Sized):
    """Tokenized rows as the trainer takes them."""

    def __init__(self, rows: Sequence[TokenizedRow]) -> None:
        self.rows = rows

    @property
    def lengths(self) -> list[int]:
        """The tokens of each item."""
        return [len(row.input_ids) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return as_item(self.rows[index])


class LazyDataset(Dataset[Any], Sized):
    """Rows that are tokenized when their turn comes; an item is the rows that one chat becomes."""

    def __init__(self, chats: Sequence[ChatRow], settings: TokenizeSettings) -> None:
        self._chats = chats
        self._settings = settings
        self._seen: dict[int, list[TokenizedRow]] = {}

    @property
    def lengths(self) -> list[int]:
        """An estimate of each item's tokens, from its characters."""
        return [_characters(chat) // _CHARACTERS_PER_TOKEN for chat in self._chats]

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: int) -> list[Item]:
        chat = self._chats[index]
        try:
            rows = self._settings.rows_of(chat)
        except DataError as error:
            raise DataError(f"{chat.where}: {error}") from None
        # Only their sizes are remembered.
        self._seen[index] = [TokenizedRow([], row.trained, row.truncated_tokens) for row in rows]
        return [as_item(row) for row in rows]

    def counts(self) -> DataCounts:
        """What became of the rows that had their turn."""
        rows = [row for own in self._seen.values() for row in own]
        kept = [row for row in rows if row.trained_tokens]
        return DataCounts(
            rows=len(kept),
            tokens=sum(len(row.trained) for row in kept),
            trained_tokens=sum(row.trained_tokens for row in kept),
            cut_rows=sum(row.truncated_tokens > 0 for row in rows),
            cut_tokens=sum(row.truncated_tokens for row in rows),
            dropped_rows=len(rows) - len(kept),
            split_chats=sum(len(own) > 1 for own in self._seen.values()),
        )


class PackedDataset(Dataset[Any], Sized):
    """Rows packed into lines of up to a number of tokens; an item is a line's rows."""

    def __init__(self, rows: Sequence[TokenizedRow], lines: Iterable[Sequence[int]]) -> None:
        self.rows = rows
        self._lines = [list(line) for line in lines]

    @property
    def lengths(self) -> list[int]:
        """The tokens of each line."""
        return [sum(len(self.rows[row].input_ids) for row in line) for line in self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> list[Item]:
        return [as_item(self.rows[row]) for row in self._lines[index]]


TrainingDataset = RowDataset | LazyDataset | PackedDataset


def _characters(chat: ChatRow) -> int:
    return len(chat.text or "") + sum(len(str(m.get("content"))) for m in chat.messages)
