"""From settings to the rows of a run: read, held out, weighted, tokenized, packed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_serve.base.source import BaseSource
from qlora_serve.errors import ConfigError
from qlora_serve.train.data import (
    ChatData,
    hold_out,
    read_sources,
    require_usable,
    weighted,
)
from qlora_serve.train.data_settings import DataSettings
from qlora_serve.train.sources import Source
from qlora_serve.wording import counted

# torch takes seconds to import; what reads and checks files needs none of it.
if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.dataset import DataCounts, TokenizeSettings, TrainingDataset
    from qlora_serve.train.masks import TokenizedRow

_DEFAULT_MAX_LENGTH = 1024
_LAZY_CHECKED = 64  # rows


@dataclass(frozen=True)
class RunData:
    """The rows of a run, before any model is loaded."""

    train: ChatData
    evaluation: ChatData | None

    def untrained_first(self) -> ChatData:
        """The held-out rows where there are any, else the training rows."""
        return self.train if self.evaluation is None else self.evaluation

    def describe(self) -> list[str]:
        """What was read, a line for each source."""
        lines = []
        for source in self.train.sources:
            weight = f", weight {source.weight:g}" if source.weight != 1 else ""
            rows = counted(source.rows, "row", "rows")
            lines.append(f"data: {source.name} is {source.format}, {rows}{weight}")
        if self.evaluation is not None:
            held = counted(len(self.evaluation.rows), "row is", "rows are")
            lines.append(f"evaluation: {held} held out")
        return lines


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run as the trainer takes them."""

    dataset: "TrainingDataset"
    evaluation: "Sequence[TokenizedRow]"
    """Tokenized rows to evaluate on; may be empty."""
    settings: "TokenizeSettings"
    _counts: "DataCounts | None"
    warnings: list[str] = field(default_factory=list)
    """What is doubtful about the rows, though they can be trained on."""

    @property
    def is_counted(self) -> bool:
        """Whether all rows are tokenized already."""
        return self._counts is not None

    @property
    def counts(self) -> "DataCounts":
        """What became of the training rows; of lazy ones, of those that had their turn."""
        from qlora_serve.train.dataset import LazyDataset

        if isinstance(self.dataset, LazyDataset):
            return self.dataset.counts()
        assert self._counts is not None
        return self._counts


def read_run_data(settings: DataSettings, seed: int) -> RunData:
    """Reads the rows of a run; torch is not needed for it.

    Raises:
        ConfigError: settings contradict each other.
        DataError: a row cannot be used, with its place in its file.
    """
    if settings.eval_data is not None and settings.eval_split is not None:
        raise ConfigError("give either eval_data or eval_split, not both")
    if settings.packing and settings.tokenization == "lazy":
        raise ConfigError(
            "packing needs the length of every row, which lazy tokenization does not know; use "
            "--tokenization eager"
        )
    data = require_usable(read_sources(settings.sources, settings.rows))
    evaluation = None
    if settings.eval_split is not None:
        data, evaluation = hold_out(data, settings.eval_split, seed)
    elif settings.eval_data is not None:
        evaluation = require_usable(read_sources([Source(settings.eval_data)]))
    return RunData(weighted(data, seed), evaluation)


def prepare_data(
    settings: DataSettings, data: RunData, base: "LoadedBase", max_length: int
) -> PreparedData:
    """Tokenizes and packs the rows of a run.

    Raises:
        DataError: a row cannot be rendered by the base's template, or nothing is left to learn.
    """
    from qlora_serve.train.batches import pack
    from qlora_serve.train.check import check_vocabulary, training_warnings
    from qlora_serve.train.dataset import (
        LazyDataset,
        PackedDataset,
        RowDataset,
        TokenizeSettings,
        tokenize_usable,
    )
    from qlora_serve.train.token_cache import TokenCache

    tokenize = TokenizeSettings(base.tokenizer, max_length, base.stop_token_ids, settings.train_on)
    cache = TokenCache()
    evaluation: Sequence[TokenizedRow] = ()
    if data.evaluation is not None:
        evaluation = tokenize_usable(data.evaluation, tokenize, cache).kept()
    if settings.tokenization == "lazy":
        lazy = LazyDataset(data.train.rows, tokenize)
        # What is wrong with all rows, such as a template without an end token, shows in the first.
        some = data.train.rows[:_LAZY_CHECKED]
        tokenize_usable(ChatData(data.train.sources, some), tokenize)
        return PreparedData(lazy, evaluation, tokenize, None)
    made = tokenize_usable(data.train, tokenize, cache)
    rows, counts = made.kept(), made.counts()
    embedding = base.model.get_input_embeddings().weight
    # ZeRO-3 leaves the shape of a weight that it has split elsewhere.
    size = getattr(embedding, "ds_shape", embedding.shape)[0]
    check_vocabulary(rows, base.tokenizer, size)
    warnings = training_warnings(data.train, data.evaluation, made, tokenize)
    dataset: TrainingDataset = RowDataset(rows)
    if settings.packing:
        dataset = PackedDataset(rows, pack([len(row.input_ids) for row in rows], max_length))
    return PreparedData(dataset, evaluation, tokenize, counts, warnings)


def describe_counts(counts: "DataCounts") -> str:
    """What is trained on, in a line."""
    line = (
        f"data: {counted(counts.rows, 'row', 'rows')}, {counts.tokens} tokens, of which "
        f"{counts.trained_tokens} count in the loss"
    )
    if counts.split_chats:
        line += (
            f"; {counted(counts.split_chats, 'chat', 'chats')} became a row for each answer, as "
            "the template rewrites earlier turns"
        )
    if counts.cut_rows:
        line += f"; {counted(counts.cut_rows, 'row was', 'rows were')} cut by "
        line += f"{counted(counts.cut_tokens, 'token', 'tokens')}"
    if counts.dropped_rows:
        line += (
            f"; {counted(counts.dropped_rows, 'row', 'rows')} dropped, as the cut left no answer"
        )
    return line


def manifest_data(data: RunData, counts: "DataCounts") -> dict[str, Any]:
    """What the adapter's manifest says of its data."""
    made: dict[str, Any] = {
        "file": data.train.name,
        "sha256": data.train.sha256,
        "sources": [asdict(source) for source in data.train.sources],
        **asdict(counts),
    }
    if data.evaluation is not None:
        made["evaluation"] = {
            "rows": len(data.evaluation.rows),
            "sources": [asdict(source) for source in data.evaluation.sources],
        }
    return made


def longest_rows(asked: int | None, source: BaseSource) -> int:
    """Where rows are cut: as asked for, or by default, within the base's context.

    Raises:
        ConfigError: the base cannot take so many tokens.
    """
    context = source.config.get("max_position_embeddings")
    if not isinstance(context, int):
        return asked or _DEFAULT_MAX_LENGTH
    if asked is None:
        return min(_DEFAULT_MAX_LENGTH, context)
    if asked > context:
        raise ConfigError(
            f"max_length: {asked} is more than the {context} tokens that {source.name} can take"
        )
    return asked
