"""The rows of a training run: read, checked one by one, held out, and weighted."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_serve.errors import DataError
from qlora_serve.train.formats import Format, Message, RowError, read_row
from qlora_serve.train.sources import Problem, Source, open_source
from qlora_serve.wording import counted

__all__ = ["ChatData", "ChatRow", "Message", "hold_out", "read_chats", "read_sources", "weighted"]


@dataclass(frozen=True)
class ChatRow:
    """One row of a data file."""

    messages: list[Message]
    """`{"role": ..., "content": ...}` in order; at least one is the assistant's. Empty for a row
    of the format `text`."""
    where: str
    """The file and the line or row number, for errors."""
    tools: list[dict[str, Any]] | None = None
    """The functions that the chat may call."""
    text: str | None = None
    """A row that was already templated."""
    source: int = 0
    """Which of the sources it is from."""

    def content_key(self) -> bytes:
        """A digest that rows share when they say the same."""
        content = [self.messages, self.tools, self.text]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class SourceSummary:
    """What was read from one source."""

    name: str
    format: str
    """Such as `chatml`; empty where no row could be read."""
    rows: int
    weight: float
    sha256: str


@dataclass(frozen=True)
class ChatData:
    """Data files, read and checked."""

    sources: list[SourceSummary]
    rows: list[ChatRow]
    problems: list[Problem] = field(default_factory=list)
    """The rows that cannot be used."""

    @property
    def name(self) -> str:
        """The sources' names."""
        return ", ".join(source.name for source in self.sources)

    @property
    def sha256(self) -> str:
        """Of the file's bytes; of several sources, of their digests and weights."""
        if len(self.sources) == 1:
            return self.sources[0].sha256
        parts = "".join(f"{source.sha256}:{source.weight}\n" for source in self.sources)
        return hashlib.sha256(parts.encode()).hexdigest()


def read_chats(path: Path | str) -> ChatData:
    """Reads one file (or data set) of which every row must be usable.

    Raises:
        DataError: it cannot be read, or a row cannot be used; names the file and the line.
    """
    return require_usable(read_sources([Source(str(path))]))


def require_usable(data: ChatData) -> ChatData:
    """Passes data on of which every row can be used.

    Raises:
        DataError: a row cannot be used; the first is named, the others are counted.
    """
    if data.problems:
        first, *others = data.problems
        count = counted(len(others), "more row", "more rows")
        more = f" ({count} cannot be used; `data check` lists them)"
        raise DataError(f"{first}{more if others else ''}")
    return data


def read_sources(sources: Sequence[Source], limit: int | None = None) -> ChatData:
    """Reads data sources, collecting the rows that cannot be used.

    Args:
        sources: what to read.
        limit: take only the first so many rows of each.

    Raises:
        DataError: a source cannot be read at all, or holds no rows.
    """
    summaries, rows, problems = [], [], []
    for number, source in enumerate(sources):
        opened = open_source(source)
        kind: Format | None = None
        found = 0
        for item in islice(opened.rows, limit):
            if isinstance(item, Problem):
                problems.append(item)
                continue
            stored, where = item
            try:
                # The first row that can be read sets the format of its file.
                kind, content = read_row(stored, kind)
            except RowError as error:
                problems.append(Problem(where + error.place, str(error)))
                continue
            found += 1
            rows.append(
                ChatRow(content.messages, where, content.tools, content.text, source=number)
            )
        if not found and not problems:
            raise DataError(f"{source.name} holds no rows")
        name = kind.name if kind else ""
        summaries.append(SourceSummary(source.name, name, found, source.weight, opened.sha256))
    return ChatData(summaries, rows, problems)


def weighted(data: ChatData, seed: int) -> ChatData:
    """Takes of each source as many rows as its weight says: whole copies, then a random part."""
    if all(source.weight == 1 for source in data.sources):
        return data
    taken: list[ChatRow] = []
    for number, source in enumerate(data.sources):
        own = [row for row in data.rows if row.source == number]
        wanted = max(1, round(len(own) * source.weight)) if own else 0
        copies, part = divmod(wanted, len(own) or 1)
        chosen = random.Random(f"{seed}:{number}:weight").sample(range(len(own)), part)
        taken += own * copies + [own[index] for index in sorted(chosen)]
    return replace(data, rows=taken)


def hold_out(data: ChatData, share: float, seed: int) -> tuple[ChatData, ChatData]:
    """Sets rows aside for evaluation.

    Rows that say the same stay on one side, so that nothing is evaluated that was trained on.

    Args:
        data: the rows.
        share: below 1, the share of rows to set aside; from 1 on, their number.
        seed: of the choice.

    Returns:
        The rows to train on and the rows to evaluate on, each in the order of the files.

    Raises:
        DataError: nothing would be left on one of the sides.
    """
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(data.rows):
        groups.setdefault(row.content_key(), []).append(index)
    wanted = max(1, round(len(data.rows) * share)) if share < 1 else int(share)
    order = list(groups.values())
    random.Random(f"{seed}:hold-out").shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= wanted:
            held.update(group)
        if len(held) == wanted:
            break
    if not held or len(held) == len(data.rows):
        raise DataError(
            f"eval_split {share:g} of {len(data.rows)} rows ({len(groups)} different ones) leaves "
            f"{'nothing to train on' if held else 'nothing to evaluate'}; choose another number"
        )
    rows = enumerate(data.rows)
    sides: tuple[list[ChatRow], list[ChatRow]] = ([], [])
    for index, row in rows:
        sides[index in held].append(row)
    return replace(data, rows=sides[0]), replace(data, rows=sides[1])


def duplicates(rows: Iterable[ChatRow]) -> list[tuple[ChatRow, ChatRow]]:
    """Rows that say the same as an earlier one, each with that earlier one."""
    seen: dict[bytes, ChatRow] = {}
    found = []
    for row in rows:
        first = seen.setdefault(row.content_key(), row)
        if first is not row:
            found.append((row, first))
    return found
