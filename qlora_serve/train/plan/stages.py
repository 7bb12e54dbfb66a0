"""The same training on several processes: what each of them holds."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qlora_serve.train.plan.memory import GRADIENT_BYTES, StageMemory, TrainingMemory
from qlora_serve.train.plan.weights import BYTES, state_bytes

if TYPE_CHECKING:
    from qlora_serve.train.plan.estimate import Planner

_ZERO_BUCKET = 500_000_000  # elements; DeepSpeed's default reduce_bucket_size
_REFUSED = "refused: a quantized base cannot be split"


def stages(planner: "Planner", memory: TrainingMemory) -> list[StageMemory]:
    """Training with DDP, with each ZeRO stage (arXiv:1910.02054), and with FSDP (arXiv:2304.11277).

    Args:
        planner: of the recipe.
        memory: of the recipe in one process.
    """
    count = planner.settings.processes * planner.settings.nodes
    if count == 1:
        return [StageMemory(stage="single", processes=1, memory=memory)]
    note = _REFUSED if planner.how.kind != "none" else ""
    split = {"activations": _split_activations(planner, memory)}
    if _trains_head(planner.model):
        memory = memory.model_copy(update=split)
    bucket = min(memory.gradients, _ZERO_BUCKET * GRADIENT_BYTES)
    ddp = {"communication": memory.gradients}
    zero1 = {"communication": bucket, "optimizer": memory.optimizer // count}
    zero2 = zero1 | {"gradients": memory.gradients // count}
    zero3 = zero2 | split | {
        "weights": memory.weights // count,
        "adapter": memory.adapter // count,
        "communication": bucket + _gathered(planner, memory.weights),
    }  # fmt: skip
    fsdp = split | _fsdp(planner, memory, count)
    return [
        StageMemory(
            stage=name, processes=count, memory=memory.model_copy(update=changes), note=said
        )
        for name, changes, said in (
            ("ddp", ddp, ""), ("zero1", zero1, ""), ("zero2", zero2, ""), ("zero3", zero3, note),
            ("fsdp", fsdp, note),
        )
    ]  # fmt: skip


def _split_activations(planner: "Planner", memory: TrainingMemory) -> int:
    """What a step takes where the output head is split, or trained on several processes."""
    if planner.how.kind != "none":
        return memory.activations
    return planner.training(planner.given, whole_logits=True).activations


def _trains_head(model: Any) -> bool:
    from qlora_serve.train.plan.trace import plain_model

    head = plain_model(model).get_output_embeddings()
    return any(parameter.requires_grad for parameter in head.parameters())


def _gathered(planner: "Planner", weights: int) -> int:
    """What ZeRO-3 holds whole at a time: a layer, the next one, and the embedding."""
    layers = int(planner.source.config.get("num_hidden_layers", 1))
    embeddings = planner.parameters.by_component.get("embeddings", 0) * BYTES[planner.dtype]
    return 2 * weights // max(1, layers) + embeddings


def _fsdp(planner: "Planner", memory: TrainingMemory, count: int) -> dict[str, int]:
    """Full shard: every process holds as many rows of each tensor, the last ones filled up.

    Buffers are not split, and packed weights would not be either.
    """
    frozen, trained = _by_training(planner.model.parameters())
    held = sum(_part(parameter, count) for parameter in frozen)
    learns = sum(_part(parameter, count) for parameter in trained)
    buffers = sum(b.numel() * b.element_size() for b in planner.model.buffers())
    return {
        "weights": (held + (learns if planner.is_full else 0)) * planner.stored_bytes + buffers
        if planner.how.kind == "none"
        else memory.weights,
        "adapter": 0 if planner.is_full else learns * 4,
        "gradients": learns * GRADIENT_BYTES,
        "optimizer": sum(
            state_bytes(planner.settings.optimizer, (math.ceil(p.shape[0] / count), *p.shape[1:]))
            for p in trained
        ),
        "communication": _fsdp_gathered(planner),
    }


def _fsdp_gathered(planner: "Planner") -> int:
    """What FSDP holds whole at a time: a layer and the next one, their gradients, and the head.

    accelerate makes a unit of each layer, of the embedding, and of norm and output head, whose
    weights stay until their backward pass. An embedding of its own is let go before the layers.
    """
    from qlora_serve.train.plan.trace import plain_model

    model = plain_model(planner.model)
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    embedding = model.get_input_embeddings()
    in_units = {id(parameter) for layer in layers for parameter in layer.parameters()}
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    in_units |= {id(parameter) for parameter in embedding.parameters()} - head
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_units]
    largest = max((_whole(planner, layer.parameters()) for layer in layers), default=0)
    _, trained = max(
        (_by_training(layer.parameters()) for layer in layers),
        key=lambda pair: sum(parameter.numel() for parameter in pair[1]),
        default=([], []),
    )
    gradients = sum(parameter.numel() for parameter in trained) * GRADIENT_BYTES
    return 2 * (largest + gradients) + _whole(planner, rest)


def _whole(planner: "Planner", parameters: Iterable[Any]) -> int:
    """Bytes of gathered tensors: on a GPU in the dtype of the steps, else as they are stored."""
    frozen, trained = (
        sum(parameter.numel() for parameter in some) for some in _by_training(parameters)
    )
    size = BYTES[planner.dtype]
    return frozen * size + trained * (size if planner.device == "cuda" else 4)


def _by_training(parameters: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """The frozen ones, and those that are trained."""
    frozen: list[Any] = []
    trained: list[Any] = []
    for parameter in parameters:
        (trained if parameter.requires_grad else frozen).append(parameter)
    return frozen, trained


def _part(parameter: Any, count: int) -> int:
    """How many numbers of a tensor a process holds."""
    return math.ceil(parameter.shape[0] / count) * math.prod(parameter.shape[1:])
