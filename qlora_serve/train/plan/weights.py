"""Parameters and the bytes that hold them, from a model's shapes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_serve.base.source import BaseSource
from qlora_serve.errors import BaseModelError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# bitsandbytes quantizes blocks of this many weights, and blocks of that many scales.
_NF4_BLOCK = 64
_SCALE_BLOCK = 256
# Its 8-bit optimizers keep the state of smaller tensors in float32.
_SMALL_TENSOR = 4096

_COMPONENTS = (
    ("adapter", re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")),
    ("output head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.")),
    ("norms", re.compile(r"norm|\.ln_")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|experts|feed_forward|ffn")),
    ("embeddings", re.compile(r"embed|wte|wpe")),
)


@dataclass(frozen=True)
class Scheme:
    """How a base's linear layers are stored."""

    kind: str
    """none, nf4, int8, gptq ..."""
    bits: int = 16
    group_size: int = 128
    double: bool = True

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a quantized linear layer of `rows` outputs and `columns` inputs."""
        count = rows * columns
        if self.kind == "nf4":
            blocks = math.ceil(count / _NF4_BLOCK)
            scales = blocks + 4 * math.ceil(blocks / _SCALE_BLOCK) if self.double else 4 * blocks
            return count // 2 + scales
        if self.kind == "int8":
            return count + 4 * rows
        groups = math.ceil(columns / (self.group_size if self.group_size > 0 else columns))
        # Packed weights and zero points, float16 scales, and each column's group as int32.
        return (count + groups * rows) * self.bits // 8 + 2 * groups * rows + 4 * columns


def scheme(source: BaseSource, quantization: str, double: bool) -> Scheme:
    """How the base will be in memory.

    Raises:
        BaseModelError: it is stored quantized, and `quantization` asks for another form.
    """
    stored = source.quantization
    if stored == "none":
        return Scheme(quantization, double=double)
    if quantization not in ("none", stored):
        raise BaseModelError(
            f"{source.name} is already quantized ({stored}); it cannot be loaded as "
            f"{quantization}: leave --quantization out, or name the unquantized base"
        )
    given = source.config["quantization_config"]
    return Scheme(
        stored,
        bits=int(given.get("bits", 4)),
        group_size=int(given.get("group_size", 128)),
        double=bool(given.get("bnb_4bit_use_double_quant", False)),
    )


def component(path: str) -> str:
    """Which part of a model a parameter belongs to, by its path."""
    for name, pattern in _COMPONENTS:
        if pattern.search(path):
            return name
    return "other"


def by_component(model: Any) -> dict[str, int]:
    """Parameters of each part of a (PEFT) model; tied ones count once."""
    counts: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        name = component(path)
        counts[name] = counts.get(name, 0) + parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def is_quantized(module: Any, output_head: Any, how: Scheme) -> bool:
    """Whether a quantized base holds this module's weight quantized: linear, and not the head."""
    import torch

    return how.kind != "none" and isinstance(module, torch.nn.Linear) and module is not output_head


def base_parameters(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """(module, name, parameter) of a base without adapter; tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def base_bytes(model: Any, how: Scheme, dtype: str, for_training: bool) -> int:
    """Bytes of a base's weights and buffers.

    Args:
        model: a base on the meta device, without adapter.
        how: how its linear layers are stored.
        dtype: what it computes in, and what the others are stored in.
        for_training: PEFT's `prepare_model_for_kbit_training` makes all that a quantized base does
            not hold quantized float32 (but for GPTQ).
    """
    head = model.get_output_embeddings()
    upcast = for_training and how.kind not in ("none", "gptq")
    size = 4 if upcast else BYTES[dtype]
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for module, name, parameter in base_parameters(model):
        if name == "weight" and is_quantized(module, head, how):
            total += how.stored_bytes(*parameter.shape)
        else:
            total += parameter.numel() * size
    return int(total)


def state_bytes(optimizer: str, shape: tuple[int, ...]) -> int:
    """Bytes that an optimizer keeps for one trained tensor.

    Args:
        optimizer: `adamw`, `adamw-8bit`, `lion-8bit`, `adafactor` or `sgd`; `paged-` changes
            nothing in the sum.
        shape: of the tensor.
    """
    kind = optimizer.removeprefix("paged-")
    count = math.prod(shape)
    moments = {"adamw": 2, "lion": 1, "sgd": 0}
    if kind == "adafactor":  # a row and a column of a matrix (arXiv:1804.04235)
        return 4 * (sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else count)
    if not kind.endswith("-8bit") or count < _SMALL_TENSOR:
        return 4 * count * moments[kind.removesuffix("-8bit")]
    return moments[kind.removesuffix("-8bit")] * (count + 4 * math.ceil(count / _SCALE_BLOCK))
