"""What `qlora-serve merge` can be told."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from qlora_serve.settings import Settings, parse_bytes

OutputDType = Literal["float16", "bfloat16", "float32"]

# Allowed share of the logits' standard deviation; docs/merge.md has the measurements behind them.
# Rounding a weight to 10 (float16) or 7 (bfloat16) stored mantissa bits moves it by at most 2^-11
# or 2^-8 of itself, and some hundred such errors add up on the way to a logit. In float32 only the
# order of additions differs.
DEFAULT_TOLERANCES: dict[str, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}


class MergeSettings(Settings):
    """Settings of one merge."""

    adapter: Path
    """The adapter's directory."""
    output: Path
    """Where the merged model goes: a new or empty directory."""
    base: str | None = None
    """The unquantized base; by default the one that the adapter names."""
    dtype: OutputDType | None = None
    """What the weights are stored in; by default what the base stores its own in."""
    max_shard_size: str = "2GB"
    """The largest weights file, such as 500MB or 2GB."""
    tolerance: float | None = Field(default=None, gt=0)
    """Allowed logit difference to the adapter, as a share of the logits' standard deviation; by
    default 0.001 for float32, 0.05 for float16, 0.4 for bfloat16."""
    force: bool = False
    """Publish a merge that did not pass its proof; the report says so."""
    streaming: Literal["auto", "on", "off"] = "auto"
    """Merge tensor by tensor, without the model in memory; auto does so for large bases."""
    streaming_above: str = "8GB"
    """The size of a base's weights from which on `--streaming auto` streams."""
    proof_dtype: OutputDType = "float32"
    """What the proof computes in; 16 bits halve its memory, for streamed merges only."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    compare_quantized: bool = True
    """When the adapter was trained on a quantized base: also measure what merging costs."""
    allow_base_mismatch: bool = False
    """Merge even into a base with other weights than the adapter was trained on."""
    as_json: bool = Field(default=False, alias="json")
    """Print the merge report as JSON on stdout."""

    @field_validator("max_shard_size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|KIB|MIB|GIB)", size.upper()):
            raise ValueError("expected a whole number with KB, MB or GB, like 2GB")
        return size.upper().replace("IB", "iB")

    @field_validator("streaming_above")
    @classmethod
    def _check_threshold(cls, size: str) -> str:
        parse_bytes(size)
        return size

    @model_validator(mode="after")
    def _check_proof(self) -> "MergeSettings":
        if self.proof_dtype != "float32" and self.streaming == "off":
            raise ValueError(
                "--proof-dtype is for streamed merges; a merge in memory computes in float32"
            )
        return self

    def tolerance_for(self, dtype: str) -> float:
        """The given tolerance, else the larger default of what is stored and computed in."""
        if self.tolerance is not None:
            return self.tolerance
        return max(DEFAULT_TOLERANCES[dtype], DEFAULT_TOLERANCES[self.proof_dtype])
