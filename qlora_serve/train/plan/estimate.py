"""A plan: parameters, memory for training and serving, what fits which card, what to change."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from qlora_serve.base.load import LoadedBase
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import locate_base
from qlora_serve.errors import ConfigError
from qlora_serve.train.plan.config import PlanSettings
from qlora_serve.train.plan.memory import (
    GRADIENT_BYTES,
    Parameters,
    Plan,
    ServingMemory,
    TrainingMemory,
)
from qlora_serve.train.plan.stages import stages
from qlora_serve.train.plan.weights import (
    BYTES,
    Scheme,
    base_bytes,
    by_component,
    scheme,
    state_bytes,
)
from qlora_serve.train.prepare import longest_rows

# On a CPU, measured with glibc (benchmarks/plan_memory.py): blocks below 32 MiB come from one heap,
# which gets gaps of about this share of what a step takes, and hardly less than so much; the
# program's own things (tokenizer, trainer, checks) take so much.
_GAPS = 0.2
_LEAST_GAPS = 150 * 2**20
_PROGRAM_BYTES = 100 * 2**20
# As `serve` computes them in one step, on a CPU and on a GPU.
_STEP_TOKENS = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Variant:
    """The part of a recipe that a plan may advise to change."""

    micro_batch: int
    length: int
    checkpointing: bool
    how: Scheme


class Planner:
    """A model without weights, and what a recipe makes of it."""

    def __init__(self, settings: PlanSettings) -> None:
        from qlora_serve.base.tokenizer import load_tokenizer
        from qlora_serve.train.model import build_model

        self.settings = settings
        self.source = locate_base(settings.base, weights=False)
        self.how = scheme(self.source, settings.quantization, settings.double_quantization)
        self.device = "cpu" if settings.device == "cpu" else "cuda"
        self.dtype = _dtype(settings.dtype, self.device)
        skeleton = build_skeleton(self.source)
        self.is_full = settings.method == "full"
        self._weights = {
            (how, trains): base_bytes(skeleton, how, self._stored(trains), trains)
            for how in {self.how, Scheme("nf4")}
            for trains in (True, False)
        }
        # Only trained tokens need the tokenizer, to be known by their text.
        tokenizer = load_tokenizer(self.source) if settings.trainable_tokens else None
        base = LoadedBase(self.source, skeleton, tokenizer, "none", self.dtype)
        # How an adapter starts moves no memory, and cannot be done without weights.
        chosen = settings.model_copy(update={"init": "default"})
        self.model: Any = build_model(base, chosen, settings.base, list)
        self.parameters = _count(self.model)
        self._traced: dict[tuple[Variant, bool], int] = {}

    def _stored(self, trains: bool) -> str:
        """What unquantized weights are held in: float32 where they are trained themselves."""
        return "float32" if trains and self.is_full else self.dtype

    @property
    def stored_bytes(self) -> int:
        """Of each unquantized weight of the base while it trains."""
        return BYTES[self._stored(trains=True)]

    @property
    def given(self) -> Variant:
        """The recipe as it is."""
        chosen = self.settings
        length = longest_rows(chosen.max_length, self.source)
        return Variant(chosen.micro_batch, length, chosen.gradient_checkpointing, self.how)

    def training(self, variant: Variant, whole_logits: bool = False) -> TrainingMemory:
        """The peak of training in a single process.

        Args:
            variant: of the recipe.
            whole_logits: whether all logits that count exist at once, as where the output head is
                split over processes, and only the model's own forward pass can use it.
        """
        trained = self.parameters.trainable
        peak = self._peak(variant, whole_logits)
        gradients = trained * GRADIENT_BYTES
        return TrainingMemory(
            weights=self._weights[variant.how, True],
            # Trained whole, the weights are what is trained.
            adapter=0 if self.is_full else trained * 4,
            gradients=gradients,
            optimizer=self._optimizer_bytes,
            # Where the peak comes before the gradients are there, they take no memory of their own.
            activations=max(0, peak - gradients),
            heap=_heap_bytes(peak) if self.device == "cpu" else 0,
        )

    def with_lora(self) -> "Planner":
        """The same recipe with an adapter in place of all weights."""
        return Planner(self.settings.model_copy(update={"method": "lora"}))

    @property
    def _optimizer_bytes(self) -> int:
        kind = self.settings.optimizer
        return sum(
            state_bytes(kind, tuple(parameter.shape))
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )

    def _peak(self, variant: Variant, whole_logits: bool) -> int:
        from qlora_serve.train.plan.trace import Step, piece_rows, plain_model, training_peak

        if (variant, whole_logits) not in self._traced:
            model = plain_model(self.model)
            _set_checkpointing(model, variant.checkpointing)
            on_cpu = self.device == "cpu"
            rows, pieces = variant.micro_batch, 1
            if on_cpu:  # a line of rows is computed in pieces, whose gradients add up
                lean = variant.how.kind not in ("none", self.source.quantization)
                rows, pieces = piece_rows(variant.micro_batch, variant.length, lean)
            positions = rows * (variant.length - 1)
            step = Step(
                rows=rows,
                length=variant.length,
                logits=max(1, math.ceil(self.settings.trained_share * positions)),
                dtype=self.dtype,
                autocast=(self.is_full or not on_cpu) and self.dtype != "float32",
                keeps_gradients=self.settings.accumulation > 1 or pieces > 1,
                is_flat=on_cpu,
                whole_logits=whole_logits,
            )
            self._traced[variant, whole_logits] = training_peak(self.model, step, variant.how)
        return self._traced[variant, whole_logits]

    def serving(self) -> ServingMemory:
        """The peak of serving base and adapters."""
        from qlora_serve.train.plan.trace import Step, plain_model, serving_peak

        chosen, config = self.settings, plain_model(self.model).config.get_text_config()
        context = self.context
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        per_token = 2 * config.num_hidden_layers * heads * width * BYTES[self.dtype]
        tokens = min(_STEP_TOKENS[self.device], context * chosen.max_sequences)
        step = Step(1, tokens, chosen.max_sequences, self.dtype)
        return ServingMemory(
            weights=self._weights[self.how, False],
            adapters=0
            if self.is_full
            else chosen.adapters * self.parameters.trainable * BYTES[self.dtype],
            kv_cache=per_token * context * chosen.max_sequences,
            step=serving_peak(self.model, step, self.how),
            kv_bytes_per_token=per_token,
        )

    @property
    def context(self) -> int:
        """Tokens of one request."""
        return self.settings.context or self.given.length


def plan(planner: Planner) -> Plan:
    """The plan of a recipe.

    Raises:
        BaseModelError: the architecture is not known, or cannot be run without its weights.
        ConfigError: a setting does not fit the base.
    """
    given = planner.given
    memory = planner.training(given)
    return Plan(
        base=planner.settings.base,
        model_type=planner.source.model_type,
        quantization=planner.how.kind,
        dtype=planner.dtype,
        device=planner.device,
        micro_batch=given.micro_batch,
        max_length=given.length,
        gradient_checkpointing=given.checkpointing,
        parameters=planner.parameters,
        training=memory,
        stages=stages(planner, memory),
        serving=planner.serving(),
        context=planner.context,
        max_sequences=planner.settings.max_sequences,
    )


def _heap_bytes(step: int) -> int:
    """What a process on a CPU holds beyond its tensors; see the constants."""
    return _PROGRAM_BYTES + max(_LEAST_GAPS, int(_GAPS * step))


def _set_checkpointing(model: Any, wanted: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # these names are about to change
        if wanted:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()


def _count(model: Any) -> Parameters:
    parameters = list(model.parameters())
    return Parameters(
        total=sum(parameter.numel() for parameter in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        by_component=by_component(model),
    )


def _dtype(chosen: str, device: str) -> str:
    if chosen != "auto":
        if chosen == "float16" and device == "cpu":
            raise ConfigError(
                "dtype: float16 gradients vanish on a CPU; use float32 or bfloat16, or a GPU"
            )
        return chosen
    return "float32" if device == "cpu" else "bfloat16"
