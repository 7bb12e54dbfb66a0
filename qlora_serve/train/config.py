"""The settings of a training run."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_serve.settings import as_mapping
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

    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` trains all weights and writes a whole model."""
    rank: int = Field(16, ge=1)
    """The rank of the update of each target module."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    use_dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """How the adapter starts. `pissa` and `olora` start from the base's own weights, `loftq` from
    what NF4 rounds away, `eva` from the data's activations."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Also train biases: all of the base, or those of the target modules."""
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, json_schema_extra={"metavar": "MODULE=RANK"}
    )
    """Other ranks for some modules, by the end of their path or a regular expression; may be
    given again."""
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, json_schema_extra={"metavar": "MODULE=ALPHA"}
    )
    """Other alphas for some modules; may be given again."""
    layers_to_transform: tuple[int, ...] = ()
    """Only these layers, counted from 0; may be given again."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapter, such as embed_tokens and lm_head;
    may be given again."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens whose rows of embedding and output head are trained, by their text; may be given
    again."""
    add_tokens: tuple[str, ...] = ()
    """New tokens, whose rows are trained and saved with the adapter, and its tokenizer with them;
    may be given again."""
    loraplus_ratio: float | None = Field(None, ge=1)
    """Learn the B matrices this many times faster than the A matrices (LoRA+)."""
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
    optimizer: Literal[
        "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "adafactor", "lion-8bit", "sgd"
    ] = "adamw"
    """`adamw` is PyTorch's fused one; 8-bit and paged ones are bitsandbytes'."""
    adam_beta1: float = Field(0.9, gt=0, lt=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's decay of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    liger: bool = False
    """Use liger-kernel's fused operators; GPUs only."""

    eval_every: int | None = Field(None, ge=1)
    """Measure the loss on the held-out rows every so many steps; otherwise once, at the end."""
    load_best: bool = False
    """Publish the checkpoint with the lowest held-out loss instead of the last step."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a lower loss."""
    sample_prompt: tuple[str, ...] = ()
    """A question to answer before, during (at each evaluation) and after training; may be given
    again."""
    sample_rows: int = Field(0, ge=0)
    """Answer also the last question of so many rows, of the held-out ones where there are any."""
    sample_tokens: int = Field(64, ge=1)
    """The longest answer to it, in tokens."""

    save_every: int | None = Field(None, ge=1)
    """Keep a checkpoint every so many steps, in OUTPUT.checkpoints."""
    keep: int = Field(3, ge=1)
    """How many of those to keep: the newest, and the best where rows are held out."""
    resume: bool = False
    """Go on from the newest whole checkpoint of a run that was stopped."""

    processes: int = Field(1, ge=1)
    """Processes on this machine, one for each GPU."""
    nodes: int = Field(1, ge=1)
    """Machines that train together; each runs the same command with its own --node-rank, and they
    share the storage of the output."""
    node_rank: int = Field(0, ge=0)
    """Which of these machines this is, from 0."""
    rendezvous: str | None = Field(None, json_schema_extra={"metavar": "HOST:PORT"})
    """Where machine 0 can be reached by the others."""
    deepspeed: str | None = Field(None, json_schema_extra={"metavar": "zero2|zero3|FILE"})
    """Split the training's memory over processes: zero2, zero3, zero2-offload, zero3-offload, or a
    DeepSpeed config file."""
    fsdp: bool = False
    """Split weights, gradients and optimizer over processes with torch's FSDP instead."""
    track: tuple[Literal["tensorboard", "swanlab", "wandb", "mlflow", "trackio"], ...] = ()
    """Also report to this tracker: tensorboard, swanlab, wandb, mlflow or trackio; may be given
    again. One that fails does not stop the run."""
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
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value  # a flag that was given once
        if isinstance(value, tuple):
            if not value:
                raise ValueError("name at least one module")
            if not all(_NAMES.fullmatch(item) for item in value):
                raise ValueError(f"where there are several, all must be names, not {ALL_LINEAR}")
            return tuple(name.strip() for item in value for name in item.split(","))
        if value == ALL_LINEAR:
            return value
        if _NAMES.fullmatch(value):
            return tuple(name.strip() for name in value.split(","))
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"this is neither names nor a regular expression ({error})") from None
        return value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        # From the right: a regular expression may hold a sign of its own.
        return as_mapping(value, str.rpartition, "MODULE=NUMBER, such as q_proj=8")

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if number <= 0:
                raise ValueError(f"{name}={number} must be more than 0")
        return value

    @model_validator(mode="after")
    def _together(self) -> "TrainSettings":
        problem = _contradiction(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @property
    def is_distributed(self) -> bool:
        """Whether more than one process trains."""
        return self.processes * self.nodes > 1

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints, beside the output."""
        return self.output.with_name(self.output.name + ".checkpoints")


_LORA_ONLY = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "trainable_tokens",
    "loraplus_ratio", "use_dora", "use_rslora",
)  # fmt: skip


def _contradiction(settings: TrainSettings) -> str | None:
    """What two settings say against each other, if they do."""
    return _method_problem(settings) or _parallel_problem(settings)


def _method_problem(settings: TrainSettings) -> str | None:
    quantized = settings.quantization != "none"
    if settings.method == "full":
        if quantized:
            return (
                f"method: full changes all weights, which {settings.quantization} ones do not "
                "allow; use --quantization none, or --method lora"
            )
        given = [name for name in _LORA_ONLY if getattr(settings, name)]
        given += ["init"] if settings.init != "default" else []
        given += ["bias"] if settings.bias != "none" else []
        if given:
            return f"method: full has no adapter, so leave out {', '.join(given)}"
    if settings.init in ("pissa", "olora"):
        if quantized:
            return (
                f"init: {settings.init} moves a part of the base's weights into the adapter, which "
                f"{settings.quantization} would round differently; use --quantization none, or "
                "--init loftq"
            )
        others = ["use_dora", "modules_to_save", "trainable_tokens", "add_tokens"]
        given = [name for name in others if getattr(settings, name)]
        given += ["bias"] if settings.bias != "none" else []
        if given:
            return f"init: {settings.init} cannot be converted to fit the base with {given[0]}"
        if settings.use_rslora and (settings.rank_pattern or settings.alpha_pattern):
            return (
                f"init: {settings.init} with use_rslora cannot be converted back to the base when "
                "there is a rank_pattern or alpha_pattern"
            )
    if settings.layers_to_transform and _is_pattern(settings.target_modules):
        return "layers_to_transform: a regular expression in target_modules already says which"
    if settings.init == "loftq" and settings.quantization != "nf4":
        return "init: loftq makes up for what NF4 rounds away; it needs --quantization nf4"
    if (settings.early_stopping or settings.load_best) and not settings.eval_every:
        name = "early_stopping" if settings.early_stopping else "load_best"
        return f"{name}: it needs --eval-every"
    return None


def _is_pattern(targets: str | tuple[str, ...]) -> bool:
    return isinstance(targets, str) and targets != ALL_LINEAR


def _parallel_problem(settings: TrainSettings) -> str | None:
    if settings.nodes > 1 and settings.rendezvous is None:
        return "nodes: several machines need --rendezvous HOST:PORT, of machine 0"
    if settings.nodes == 1 and (settings.rendezvous or settings.node_rank):
        return "rendezvous, node_rank: these are for --nodes 2 or more"
    if settings.fsdp and settings.deepspeed:
        return "fsdp: it splits the same as --deepspeed; choose one"
    if settings.fsdp and not settings.is_distributed:
        return "fsdp: there is nothing to split with one process; use --processes 2 or more"
    if settings.node_rank >= settings.nodes:
        return f"node_rank: {settings.node_rank} of {settings.nodes} machines; they count from 0"
    return None
