"""What the commands of this room can be told."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from qlora_serve.settings import Settings, parse_bytes

OutputDType = Literal["float16", "bfloat16", "float32"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]
CombineMethod = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd",
]  # fmt: skip

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
    quantize: Literal["none", "nf4", "gptq"] = "none"
    """Also write a quantized copy of the merged model, to a directory beside it: OUTPUT-nf4 or
    OUTPUT-gptq; the report compares the two."""
    gptq_bits: int | None = None
    """With `--quantize gptq`: 2, 3, 4 (default) or 8."""
    gptq_group_size: int | None = None
    """With `--quantize gptq`: inputs that share a scale; by default that of `base prepare`."""
    calibration: Path | None = None
    """With `--quantize gptq`: JSONL rows of {"messages": [...]} or {"text": "..."}, best the data
    that the adapter was trained on; by default those that come along."""
    gguf: tuple[GgufType, ...] = ()
    """Also write a GGUF file of this type beside the weights: f32, f16, bf16 or q8_0; may be given
    several times."""
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

    @model_validator(mode="after")
    def _check_gptq(self) -> "MergeSettings":
        given = [
            name
            for name in ("gptq_bits", "gptq_group_size", "calibration")
            if getattr(self, name) is not None
        ]
        if given and self.quantize != "gptq":
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag} is for --quantize gptq only; leave it out")
        return self

    @property
    def quantized_output(self) -> Path:
        """Where the quantized copy goes."""
        return self.output.with_name(f"{self.output.name}-{self.quantize}")

    def tolerance_for(self, dtype: str) -> float:
        """The given tolerance, else the larger default of what is stored and computed in."""
        if self.tolerance is not None:
            return self.tolerance
        return max(DEFAULT_TOLERANCES[dtype], DEFAULT_TOLERANCES[self.proof_dtype])


class CombineSettings(Settings):
    """Settings of `combine`."""

    adapters: tuple[str, ...]
    """The adapters' directories, each with an optional weight: DIR or DIR=0.5."""
    output: Path
    """Where the new adapter goes: a new or empty directory."""
    method: CombineMethod = "cat"
    """cat and svd add the updates themselves; the others work on their factors, or with _svd on
    the whole updates: linear (weighted sum), ties (arXiv:2306.01708), dare (arXiv:2311.03099)."""
    density: float | None = Field(default=None, gt=0, le=1)
    """The share of values that ties and dare keep; needed by them."""
    rank: int | None = Field(default=None, ge=1)
    """The rank of an SVD's result; by default the largest of the adapters'."""
    seed: int = 0
    """Of the values that dare drops."""
    base: str | None = None
    """The base; by default the one that the first adapter names."""
    as_json: bool = Field(default=False, alias="json")
    """Print the report as JSON on stdout."""

    @field_validator("adapters")
    @classmethod
    def _check_adapters(cls, adapters: tuple[str, ...]) -> tuple[str, ...]:
        if len(adapters) < 2:
            raise ValueError("expected at least two adapters, each DIR or DIR=WEIGHT")
        return adapters


class FoldSettings(Settings):
    """Settings of `fold`."""

    adapter: Path
    """The adapter's directory."""
    output: Path
    """Where the smaller adapter goes: a new or empty directory."""
    rank: int | None = Field(default=None, ge=1)
    """The new rank of every module."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Instead of a rank: the share of each update's squared norm to keep, such as 0.95."""
    base: str | None = None
    """The base; by default the one that the adapter names."""
    as_json: bool = Field(default=False, alias="json")
    """Print the report as JSON on stdout."""


class ExtractSettings(Settings):
    """Settings of `extract`."""

    model: str
    """The fine-tuned model: a directory or hub id."""
    base: str
    """The base that it was fine-tuned from, unquantized."""
    output: Path
    """Where the adapter goes: a new or empty directory."""
    rank: int | None = Field(default=None, ge=1)
    """The rank of every module."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Instead of a rank: the share of each change's squared norm to keep (0.9 when neither is
    given)."""
    save_others: bool = False
    """Save changed norms, embeddings and biases whole (modules_to_save); else they are refused."""
    device: str = "auto"
    """Where to compute the proof: auto, cpu, cuda or cuda:N."""
    as_json: bool = Field(default=False, alias="json")
    """Print the report as JSON on stdout."""


class ExportSettings(Settings):
    """Settings of `export`."""

    source: str
    """A model (directory or hub id) or an adapter's directory."""
    output: Path
    """Where the files go: a new or empty directory."""
    gguf: tuple[GgufType, ...] = ("f16",)
    """The type of the weights: f32, f16, bf16 or q8_0; may be given several times."""
    base: str | None = None
    """An adapter's base; by default the one that it names."""
    as_json: bool = Field(default=False, alias="json")
    """Print the report as JSON on stdout."""
