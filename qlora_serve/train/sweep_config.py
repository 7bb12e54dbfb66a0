"""The settings of a sweep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from qlora_serve.settings import Settings
from qlora_serve.train.config import TrainSettings

_MOST_POINTS = 1000
_PER_POINT = ("output", "resume")


class SweepSettings(Settings):
    """What `qlora-serve sweep` is told, as a YAML file."""

    output: Path
    """The folder of the sweep: an adapter's directory for each point, and the comparison."""
    recipe: dict[str, Any]
    """The settings that all points share, as in a training recipe."""
    grid: dict[str, list[Any]]
    """Setting → its values; every combination is a point."""
    heldout: Path
    """The rows on which the adapters are compared."""
    answers: bool = True
    """Also generate and score answers, not the loss alone."""
    max_tokens: int = Field(128, ge=1)
    """The longest answer to generate."""
    eval_rows: int | None = Field(None, ge=1)
    """Only the first so many held-out rows."""
    json_keys: tuple[str, ...] = ()
    """Keys that an answer's JSON object must have."""
    as_json: bool = Field(default=False, alias="json")
    """Print the result as JSON."""

    @field_validator("recipe", "grid", mode="before")
    @classmethod
    def _dashes(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {str(key).replace("-", "_"): item for key, item in value.items()}

    @field_validator("grid")
    @classmethod
    def _grid(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        known = TrainSettings.model_fields
        for key, values in value.items():
            if key not in known or key in _PER_POINT:
                raise ValueError(f"{key!r} is no setting of train that a grid can hold")
            if not values:
                raise ValueError(f"{key} has no values")
            if len({json.dumps(item, default=str) for item in values}) < len(values):
                raise ValueError(f"{key} has a value twice")
        if not value:
            raise ValueError("expected at least one setting with its values, like rank: [8, 16]")
        count = 1
        for values in value.values():
            count *= len(values)
        if count > _MOST_POINTS:
            raise ValueError(f"{count} points are more than {_MOST_POINTS}")
        return value
