"""What a model will see of some data, and what is wrong with it, before any training.

The tokens are made by the same functions as in training. Of the base only its tokenizer, its
configs and its embeddings are read.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_serve.base.source import BaseSource
from qlora_serve.errors import BaseModelError, DataError
from qlora_serve.train.data import ChatData, ChatRow, SourceSummary, duplicates
from qlora_serve.train.dataset import DataCounts, TokenizedData, TokenizeSettings, tokenize_data
from qlora_serve.train.masks import TokenizedRow
from qlora_serve.train.sources import Problem
from qlora_serve.wording import counted

_BUCKETS = 10
_NAMED = 3
_PLACE = re.compile(r"(?P<file>.*), (?:line|row) (?P<number>\d+)")


@dataclass(frozen=True)
class LengthBucket:
    """Rows of like length."""

    first: int
    """In tokens."""
    last: int
    """Inclusive."""
    rows: int


@dataclass(frozen=True)
class EndTokens:
    """How the rows end."""

    stop_tokens: list[str]
    """The tokens at which an answer ends."""
    rows_with: int
    """Rows in which one of them counts in the loss."""
    rows_without: list[str]
    """Where the rows are in which no such token counts in the loss although nothing was cut."""
    pad_token: str | None
    pad_is_stop: bool
    """Whether padding uses a token that also ends answers."""
    trained_pads: int
    """How many tokens that count in the loss look like padding; they stay in it."""


@dataclass(frozen=True)
class DataReport:
    """The result of a check."""

    base: str
    max_length: int
    train_on: str
    sources: list[SourceSummary]
    counts: DataCounts
    longest: int
    """The tokens of the longest row before any cut."""
    lengths: list[LengthBucket]
    problems: list[Problem]
    """Rows that cannot be read or rendered."""
    duplicates: list[tuple[str, str]]
    """Each row that says the same as an earlier one, and where that is."""
    ends: EndTokens
    beyond_vocabulary: list[str]
    """Tokens in the rows for which the base has no embedding."""
    untrained: list[str]
    """Special tokens of the template that the base has never learnt; see `base.untrained`."""
    fatal: list[str] = field(default_factory=list)
    """What training would stop at."""
    warnings: list[str] = field(default_factory=list)
    """What training would warn of."""

    def as_json(self) -> dict[str, Any]:
        """The report in JSON's types."""
        pairs = [{"where": where, "same_as": first} for where, first in self.duplicates]
        return {"ok": not self.fatal} | asdict(self) | {"duplicates": pairs}


@dataclass(frozen=True)
class CheckedData:
    """A report, with the rows that it is about."""

    report: DataReport
    chats: list[ChatRow]
    tokens: TokenizedData
    tokenizer: Any

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.tokenizer.decode(tokens))


def check_data(data: ChatData, source: BaseSource, settings: TokenizeSettings) -> CheckedData:
    """Checks data against a base.

    Raises:
        BaseModelError: the base's embeddings cannot be read.
    """
    from qlora_serve.base.untrained import read_vocabulary_weights, untrained_template_tokens

    tokenizer = settings.tokenizer
    tokens = tokenize_data(data.rows, settings)
    weights = read_vocabulary_weights(source)
    size = min(len(weight) for weight in weights) if weights else None
    report = DataReport(
        base=source.name,
        max_length=settings.max_length,
        train_on=settings.train_on,
        sources=data.sources,
        counts=tokens.counts(),
        longest=max((len(r.input_ids) + r.truncated_tokens for r in tokens.rows), default=0),
        lengths=length_histogram(len(r.input_ids) + r.truncated_tokens for r in tokens.rows),
        problems=in_order([*data.problems, *tokens.problems]),
        duplicates=[(row.where, first.where) for row, first in duplicates(data.rows)],
        ends=find_ends(data.rows, tokens, tokenizer, settings.stop_ids),
        beyond_vocabulary=beyond_vocabulary(tokens.rows, tokenizer, size),
        untrained=untrained_template_tokens(tokenizer, weights),
    )
    report.fatal.extend(fatal_lines(report))
    report.warnings.extend(warning_lines(report))
    return CheckedData(report, data.rows, tokens, tokenizer)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems by file and line, whatever found them."""
    files: dict[str, int] = {}

    def place(problem: Problem) -> tuple[int, int]:
        match = _PLACE.match(problem.where)
        assert match, problem.where
        return files.setdefault(match["file"], len(files)), int(match["number"])

    return sorted(problems, key=place)


def stop_ids_of(source: BaseSource, tokenizer: Any) -> frozenset[int]:
    """The tokens at which a base's answers end, as `LoadedBase.stop_token_ids`, without weights."""
    from transformers import AutoConfig, GenerationConfig

    from qlora_serve.base.tokenizer import stop_token_ids

    configs = []
    try:
        configs.append(AutoConfig.from_pretrained(source.path))
        if (source.path / "generation_config.json").is_file():
            configs.append(GenerationConfig.from_pretrained(source.path))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(f"cannot read the config of {source.path}: {reason}") from None
    return stop_token_ids(tokenizer, *configs)


def length_histogram(lengths: Iterable[int]) -> list[LengthBucket]:
    """Rows by their length, in up to ten buckets of equal width."""
    found = sorted(lengths)
    if not found:
        return []
    width = -(-(found[-1] - found[0] + 1) // _BUCKETS)
    starts = range(found[0], found[-1] + 1, width)
    return [
        LengthBucket(low, low + width - 1, sum(low <= length < low + width for length in found))
        for low in starts
    ]


def find_ends(
    chats: Sequence[ChatRow], tokens: TokenizedData, tokenizer: Any, stop_ids: Collection[int]
) -> EndTokens:
    """How the rows end."""
    pad = tokenizer.pad_token_id
    without: list[str] = []
    found = 0
    for row, origin in zip(tokens.rows, tokens.origins, strict=True):
        pairs = zip(row.input_ids, row.trained, strict=True)
        trained = {token for token, counts in pairs if counts}
        if trained & set(stop_ids):
            found += 1
        elif not row.truncated_tokens:
            without.append(chats[origin].where)
    return EndTokens(
        stop_tokens=[str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(stop_ids)],
        rows_with=found,
        rows_without=without,
        pad_token=tokenizer.pad_token,
        pad_is_stop=pad in stop_ids,
        trained_pads=sum(
            token == pad and counts
            for row in tokens.rows
            for token, counts in zip(row.input_ids, row.trained, strict=True)
        ),
    )


def beyond_vocabulary(rows: Iterable[TokenizedRow], tokenizer: Any, size: int | None) -> list[str]:
    """Tokens for which the embedding, of `size` rows, has none."""
    used = {token for row in rows for token in row.input_ids}
    return [
        str(tokenizer.convert_ids_to_tokens(token))
        for token in sorted(used)
        if size is not None and token >= size
    ]


def check_vocabulary(rows: Iterable[TokenizedRow], tokenizer: Any, size: int) -> None:
    """Stops a training run whose rows hold tokens that the base has no embedding for.

    Raises:
        DataError: they do.
    """
    found = beyond_vocabulary(rows, tokenizer, size)
    if found:
        raise DataError(_beyond(found))


def fatal_lines(report: DataReport) -> list[str]:
    """What training stops at."""
    lines = []
    if report.problems:
        lines.append(f"{counted(len(report.problems), 'row', 'rows')} cannot be used")
    if not report.counts.rows:
        lines.append(f"nothing is left to learn within {report.max_length} tokens")
    if report.beyond_vocabulary:
        lines.append(_beyond(report.beyond_vocabulary))
    return lines


def warning_lines(report: DataReport) -> list[str]:
    """What training warns of."""
    lines = row_warnings(report.counts, report.max_length, report.duplicates)
    lines += end_warnings(report.ends, report.train_on)
    if report.untrained:
        lines.append(
            f"the base has never learnt {', '.join(report.untrained)}, which its chat template "
            "writes: train the embeddings and the output head too (modules_to_save)"
        )
    return lines


def row_warnings(counts: DataCounts, max_length: int, same: Sequence[tuple[Any, Any]]) -> list[str]:
    """Of rows that are cut, dropped or there twice."""
    lines = []
    if counts.cut_rows:
        longer = counted(counts.cut_rows, "row is", "rows are")
        lost = counted(counts.cut_tokens, "token is", "tokens are")
        lines.append(
            f"{longer} longer than {max_length} tokens, and {lost} cut; raise --max-length to keep "
            "all of them"
        )
    if counts.dropped_rows:
        dropped = counted(counts.dropped_rows, "row is", "rows are")
        lines.append(f"{dropped} dropped: within {max_length} tokens there is nothing to learn")
    if same:
        lines.append(f"{counted(len(same), 'row says', 'rows say')} the same as an earlier one")
    return lines


def end_warnings(ends: EndTokens, train_on: str) -> list[str]:
    """Of rows whose end is not trained."""
    if not ends.rows_without or train_on == "prompt":
        return []
    named = ", ".join(ends.rows_without[:_NAMED])
    more = len(ends.rows_without) - _NAMED
    return [
        f"{counted(len(ends.rows_without), 'row holds', 'rows hold')} no end token "
        f"({' or '.join(ends.stop_tokens)}), so that the model does not learn to stop there: "
        f"{named}" + (f" and {more} more" if more > 0 else "")
    ]


def training_warnings(
    train: ChatData,
    evaluation: ChatData | None,
    tokens: TokenizedData,
    settings: TokenizeSettings,
) -> list[str]:
    """The same checks in a training run, on what it has tokenized already."""
    # Rows that a weight above 1 repeats are meant to be there twice.
    repeated = any(source.weight > 1 for source in train.sources)
    same = [] if repeated else duplicates(train.rows)
    lines = row_warnings(tokens.counts(), settings.max_length, same)
    ends = find_ends(train.rows, tokens, settings.tokenizer, settings.stop_ids)
    lines += end_warnings(ends, settings.train_on)
    if evaluation is not None:
        trained = {row.content_key() for row in train.rows}
        shared = sum(row.content_key() in trained for row in evaluation.rows)
        if shared:
            both = counted(shared, "row to evaluate on is", "rows to evaluate on are")
            lines.append(f"{both} trained on too")
    return lines


def _beyond(tokens: Sequence[str]) -> str:
    named = ", ".join(tokens[:_NAMED]) + (" ..." if len(tokens) > _NAMED else "")
    return (
        f"{counted(len(tokens), 'token lies', 'tokens lie')} beyond the base's embeddings "
        f"({named}): tokenizer and weights do not belong together"
    )
