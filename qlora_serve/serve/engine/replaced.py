"""Modules of which some adapters have their own: replaced layers, norms, embeddings, and biases.

A module is wrapped when the first adapter that needs it is loaded, so that a base whose adapters
need none pays nothing.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.base.gptq import is_gptq
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.attention import StepContext
from qlora_serve.serve.engine.embedding import PanelEmbedding, tokens_of
from qlora_serve.serve.engine.kernels.native import Kernels
from qlora_serve.serve.engine.linear import CodedLinear, FastLinear, NativeLinear, PanelLinear
from qlora_serve.serve.engine.updates import add_update

# Two adapters that load at once must not wrap a module twice: its update would count twice.
_wrapping = Lock()

RowFunction = Callable[[Tensor, Tensor, float], Tensor]
"""(inputs [1, rows, ...], the output so far [1, rows, ...], the request's scale) → the output."""


@dataclass(frozen=True, eq=False)
class OwnModule:
    """An adapter's own copy of a module: the base's code with other parameters."""

    module: nn.Module
    vocabulary: int | None = None
    """The tokens that it knows, of an embedding or output layer with more than the base's."""

    def __call__(self, inputs: Tensor, _: Tensor, scale: float) -> Tensor:
        """The copy's output."""
        assert scale == 1, "a replaced module knows no scale; the registry refuses it"
        output: Tensor = self.module(inputs)
        return output


@dataclass(frozen=True, eq=False)
class EmbeddingUpdate:
    """Low-rank update of an embedding, with DoRA's gain when there is one (arXiv:2402.09353)."""

    a_t: Tensor
    """[vocabulary, rank]"""
    b_t: Tensor | None
    """[rank, hidden], multiplied by the scaling, the gain, and the factor that some families
    multiply their embeddings by; None where `blocks` holds it"""
    gain: Tensor | None
    """[hidden], float32"""
    kernels: Kernels | None = None
    unit: Tensor | None = None
    """The identity of the rank, and"""
    blocks: Tensor | None = None
    """what `b_t` would be, both as the kernels read them."""

    def __call__(self, ids: Tensor, output: Tensor, scale: float) -> Tensor:
        """Updates `output` [1, rows, hidden] for ids [1, rows]."""
        assert scale == 1 or self.gain is None, "DoRA's gain holds for one scale"
        if self.gain is not None:
            output = (output * self.gain).to(output.dtype)
        low = F.embedding(ids, self.a_t)  # [1, rows, rank]
        if self.kernels is None:
            assert self.b_t is not None
            return output + low @ self.b_t * scale
        assert self.unit is not None
        assert self.blocks is not None
        output = output.clone(memory_format=torch.contiguous_format)
        add_update(self.kernels, low[0], self.unit, self.blocks, scale, output[0])
        return output


class AdapterModule(nn.Module):
    """A module of the base, with the rows of some adapters computed in their own way."""

    def __init__(self, base: nn.Module, name: str, context: StepContext, is_output: bool) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._context = context
        self._is_output = is_output
        is_look_up = is_output or isinstance(base, nn.Embedding | PanelEmbedding)
        self._rows = tokens_of(base) if is_look_up else 0

    def forward(self, inputs: Tensor) -> Tensor:
        """[1, rows, ...] → [1, rows, ...]"""
        context = self._context
        rows = context.output_rows if self._is_output else context.adapter_rows
        output = self._of_base(inputs, [one.resident.own.get(self.name) for *_, one in rows])
        for first, last, one in rows:
            own = one.resident.own.get(self.name)
            if own is not None:
                found = own(inputs[:, first:last], output[:, first:last], one.scale)
                output[:, first:last, : found.shape[-1]] = found
        return output

    def _of_base(self, inputs: Tensor, owns: list[RowFunction | None]) -> Tensor:
        """The base's output, made to fit the largest vocabulary of the step's adapters."""
        output: Tensor
        sizes = [own.vocabulary or 0 for own in owns if isinstance(own, OwnModule)]
        more = max(sizes, default=0) - self._rows if any(sizes) else 0
        if more <= 0:
            output = self.base(inputs)
        elif self._is_output:
            # The runner masks what is beyond each row's own vocabulary when the model is done.
            output = F.pad(self.base(inputs), (0, more))
        else:
            # Ids that the base does not know stand in rows of which this output is replaced.
            output = self.base(inputs.clamp(max=self._rows - 1))
        return output

    @property
    def weight(self) -> Any:
        """The base module's weight, for models that look at it."""
        return self.base.weight


def own_module(
    base: Any,
    name: str,
    parameters: Mapping[str, Tensor],
    width: int,
    context: StepContext,
    vocabulary: int | None = None,
) -> OwnModule:
    """A module like `base` with some parameters replaced; the others are shared.

    Args:
        base: the base's module.
        name: its path, for errors.
        parameters: name → new value.
        width: the length of hidden states. A norm of another length works on each head, and
            families differ in where such a norm's input has its rows.
        context: holds the kernels of the engine, if any.
        vocabulary: the tokens of an embedding or output layer that is larger than the base's.

    Raises:
        AdapterError: the module is of a kind whose rows may depend on one another, or is quantized.
    """
    is_norm = type(base).__name__.endswith("Norm")
    is_linear = isinstance(base, nn.Linear | NativeLinear) or is_gptq(base)
    if not (is_norm or is_linear or isinstance(base, nn.Embedding | PanelEmbedding)):
        raise AdapterError(
            f"the adapter replaces {name}, a {type(base).__name__}; the engine replaces linear "
            "layers, embeddings and norms only"
        )
    if is_norm and any(tensor.shape != (width,) for tensor in parameters.values()):
        raise AdapterError(
            f"the adapter replaces {name}, a norm of each attention head; the engine replaces "
            "norms of whole hidden states only"
        )
    new = _parameters_of(base, is_linear, parameters)
    if vocabulary is not None and new.get("bias") is not None and "bias" not in parameters:
        raise AdapterError(
            f"the adapter has an enlarged vocabulary and no biases for the new tokens of {name}; "
            "PEFT does not save them, so its answers cannot be reproduced"
        )
    for part, tensor in parameters.items():
        old = new.get(part)
        # Also catches weights that are packed: bitsandbytes stores bytes in another shape.
        rows = old.shape[:1] if old is not None and vocabulary is None else (vocabulary,)
        if old is None or tensor.shape != (*rows, *old.shape[1:]) or not old.is_floating_point():
            raise AdapterError(
                f"the adapter replaces the {part} of {name}, which is quantized or has another "
                "shape in this base; serve it on the unquantized base"
            )
        new[part] = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
    if is_linear:
        return OwnModule(_linear(new, context), vocabulary)
    own = base.with_weight(new["weight"]) if isinstance(base, PanelEmbedding) else _like(base, new)
    return OwnModule(own, vocabulary)


def _parameters_of(base: Any, is_linear: bool, replaced: Mapping[str, Tensor]) -> dict[str, Any]:
    """A module's parameters by name; None for quantized ones.

    A weight in panels that is among the `replaced` is not put together: it only shows its form.
    """
    if isinstance(base, PanelEmbedding | PanelLinear):
        form = base.panels.new_zeros(1).expand(tokens_of(base), base.panels.shape[1])
        weight: Any = form if "weight" in replaced else base.weight
        return {"weight": weight, "bias": getattr(base, "bias", None)}
    if not is_linear:
        return dict(base._parameters)
    # gptqmodel shows no tensor
    weight = None if isinstance(base, CodedLinear) else getattr(base, "weight", None)
    return {"weight": weight if isinstance(weight, Tensor) else None, "bias": base.bias}


def _linear(parameters: dict[str, Any], context: StepContext) -> nn.Module:
    out_features, in_features = parameters["weight"].shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(parameters["weight"], requires_grad=False)
    linear.register_parameter("bias", parameters.get("bias"))
    if context.kernels is None:
        return linear
    return FastLinear(linear, context.kernels)


def _like(base: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """A shallow copy, which runs the same code and shares all but the parameters."""
    own = copy.copy(base)
    own._parameters = parameters
    return own


def wrap(model: Any, name: str, context: StepContext, is_output: bool) -> None:
    """Lets a module of the model ask the adapters of each row for their own way, once.

    Safe while another thread runs the model: the swap is one assignment in a dict, which the
    interpreter does whole, and a forward pass that still meets the unwrapped module computes the
    same, since no adapter that is running has its own copy of a module that was not wrapped yet.
    `setattr` would do more than the one assignment.
    """
    parent_name, _, child = name.rpartition(".")
    modules = model.get_submodule(parent_name)._modules
    with _wrapping:
        if not isinstance(modules[child], AdapterModule):
            modules[child] = AdapterModule(modules[child], name, context, is_output)
