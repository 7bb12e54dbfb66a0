"""The settings of an evaluation."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qlora_serve.adapters.folder import named_paths
from qlora_serve.settings import Settings


class EvalSettings(Settings):
    """What `qlora-serve eval` is told."""

    base: str
    """The base model: a directory, a prepared name or a hub id."""
    adapter: dict[str, Path] = Field(
        default_factory=dict, json_schema_extra={"metavar": "NAME=DIR"}
    )
    """An adapter and its name; may be given again. In YAML a mapping of names to directories."""
    data: Path
    """The held-out rows, in any format that `train` takes."""
    rows: int | None = Field(None, ge=1)
    """Only the first so many of them."""

    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantize the base while loading it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (the first GPU if there is one), `cpu`, `cuda` or `cuda:N`."""

    max_length: int = Field(1024, ge=2)
    """For the loss, longer rows are cut to this many tokens."""
    max_tokens: int = Field(128, ge=1)
    """The longest answer to generate."""
    batch: int = Field(8, ge=1)
    """Rows that go through the model at a time."""
    answers: bool = True
    """Generate answers; without them there are only loss and perplexity, in a fraction of the
    time."""
    json_keys: tuple[str, ...] = ()
    """Keys that an answer's JSON object must have; may be given again. JSON is looked at when these
    are given, or when every reference is an object."""

    confidence: float = Field(0.95, gt=0, lt=1)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    """Of the bootstrap and of the test."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of these."""
    output: Path | None = None
    """Write every row's answers and scores into this file, as JSON Lines."""
    update_reports: bool = False
    """Put the result into the report.html of each adapter that this tool trained."""
    as_json: bool = Field(default=False, alias="json")
    """Print the result as JSON."""

    @field_validator("adapter", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return named_paths(value)
