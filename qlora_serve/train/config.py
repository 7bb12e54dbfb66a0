"""The settings of a training run."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from qlora_serve.train.data_settings import DataSettings

ALL_LINEAR = "all-linear"
_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


class TrainSettings(DataSettings):
    """What `qlora-serve train` is told."""

    base: str
    """The base model: a directory, a prepared name or a hub id."""
    output: Path
    """The adapter directory to make; nothing may be there yet."""

    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantize the base while loading it; `nf4` is QLoRA."""
    double_quantization: bool = True
    """With nf4, quantize the block scales too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the base computes in; the adapter itself is always float32."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (the first GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    unquantized_base: str | None = None
    """For a base whose files are quantized: the unquantized one, which merging will load."""

    rank: int = Field(16, ge=1)
    """The rank of the update of each target module."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """The share of a LoRA layer's inputs that training sets to zero."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear` (all but the output head), names such as q_proj,v_proj, or a regular expression
    for whole module paths."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Train for this many steps instead of by epochs."""
    micro_batch: int = Field(4, ge=1)
    """Rows that go through the model at a time."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches in one optimizer step."""
    learning_rate: float = Field(2e-4, gt=0)
    """The highest learning rate of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after its warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """The share of all steps in which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's decay of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    save_steps: int | None = Field(None, ge=1)
    """Keep a checkpoint every so many steps, in OUTPUT.checkpoints."""
    keep_checkpoints: int = Field(3, ge=1)
    """How many of those to keep, the newest."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the adapter's first weights, the order of rows and dropout."""

    @field_validator("base", "unquantized_base")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("a base model needs a name")
        return value

    @field_validator("target_modules")
    @classmethod
    def _split_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, tuple):
            if not value:
                raise ValueError("name at least one module")
            return value
        if value == ALL_LINEAR:
            return value
        if _NAMES.fullmatch(value):
            return tuple(name.strip() for name in value.split(","))
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"this is neither names nor a regular expression ({error})") from None
        return value

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints, beside the output."""
        return self.output.with_name(self.output.name + ".checkpoints")
