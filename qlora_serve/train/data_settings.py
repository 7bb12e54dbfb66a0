"""The settings that say what is trained on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qlora_serve.settings import Settings
from qlora_serve.train.sources import Source, parse_source

TrainOn = Literal["assistant", "last", "prompt", "all"]


class DataSettings(Settings):
    """Rows, which of their tokens count, and how they are put into batches."""

    data: tuple[str, ...]
    """The training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a hub data set as org/name,
    or modelscope:org/name. Give it several times to mix; FILE:0.3 takes three tenths of a file."""
    rows: int | None = Field(None, ge=1)
    """Use only the first so many rows of each file."""
    eval_data: str | None = None
    """Rows to evaluate on; a source like those of data."""
    eval_split: float | None = Field(None, gt=0)
    """Evaluate on rows held out of the data instead: a share below 1, or a number of rows."""
    train_on: TrainOn = "assistant"
    """What counts in the loss: all that the `assistant` says, its `last` turn, only the `prompt`,
    or `all` tokens."""
    max_length: int | None = Field(None, ge=2)
    """Longer rows are cut to this many tokens; 1024 by default, or the base's context length where
    that is shorter."""
    packing: bool = False
    """Fill each line of a micro-batch up to max_length with whole rows, which cannot see each
    other."""
    group_by_length: bool = True
    """Put rows of like length into one micro-batch, where micro-batches are padded."""
    tokenization: Literal["eager", "lazy"] = "eager"
    """`eager` tokenizes all rows first and remembers the result by its content; `lazy` tokenizes
    each row when its turn comes."""

    @field_validator("data", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return (str(value),)
        if isinstance(value, Iterable):
            return tuple(str(item) for item in value)
        return value

    @field_validator("eval_data", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("data")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one file")
        for text in value:
            parse_source(text)
        return value

    @field_validator("eval_split")
    @classmethod
    def _share_or_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError("give a share below 1, or a whole number of rows")
        return value

    @property
    def sources(self) -> list[Source]:
        """`data`, taken apart."""
        return [parse_source(text) for text in self.data]
