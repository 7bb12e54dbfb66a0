"""Modules of which some adapters have their own: replaced layers, norms, embeddings, and biases.

A module is wrapped when the first adapter that needs it is loaded, so that a base whose adapters
need none pays nothing.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.attention import StepContext
from qlora_serve.serve.engine.linear import FastLinear, NativeLinear

# Two adapters that load at once must not wrap a module twice: its update would count twice.
_wrapping = Lock()

RowFunction = Callable[[Tensor, Tensor, float], Tensor]
"""(inputs [1, rows, ...], the output so far [1, rows, ...], the request's scale) → the output."""


@dataclass(frozen=True, eq=False)
class OwnModule:
    """An adapter's own copy of a module: the base's code with other parameters."""

    module: nn.Module

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
    b_t: Tensor
    """[rank, hidden], multiplied by the scaling, the gain, and the factor that some families
    multiply their embeddings by"""
    gain: Tensor | None
    """[hidden], float32"""

    def __call__(self, ids: Tensor, output: Tensor, scale: float) -> Tensor:
        """Updates `output` [1, rows, hidden] for ids [1, rows]."""
        assert scale == 1 or self.gain is None, "DoRA's gain holds for one scale"
        if self.gain is not None:
            output = (output * self.gain).to(output.dtype)
        return output + F.embedding(ids, self.a_t) @ self.b_t * scale


class AdapterModule(nn.Module):
    """A module of the base, with the rows of some adapters computed in their own way."""

    def __init__(self, base: nn.Module, name: str, context: StepContext, is_output: bool) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._context = context
        self._is_output = is_output

    def forward(self, inputs: Tensor) -> Tensor:
        """[1, rows, ...] → [1, rows, ...]"""
        output: Tensor = self.base(inputs)
        context = self._context
        rows = context.output_rows if self._is_output else context.adapter_rows
        for first, last, adapter in rows:
            own = adapter.resident.own.get(self.name)
            if own is not None:
                output[:, first:last] = own(
                    inputs[:, first:last], output[:, first:last], adapter.scale
                )
        return output

    @property
    def weight(self) -> Any:
        """The base module's weight, for models that look at it."""
        return self.base.weight


def own_module(
    base: Any, name: str, parameters: Mapping[str, Tensor], width: int, context: StepContext
) -> OwnModule:
    """A module like `base` with some parameters replaced; the others are shared.

    Args:
        base: the base's module.
        name: its path, for errors.
        parameters: name → new value.
        width: the length of hidden states. A norm of another length works on each head, and
            families differ in where such a norm's input has its rows.
        context: holds the kernels of the engine, if any.

    Raises:
        AdapterError: the module is of a kind whose rows may depend on one another, or is quantized.
    """
    is_norm = type(base).__name__.endswith("Norm")
    is_linear = isinstance(base, nn.Linear | NativeLinear)
    if not (is_norm or is_linear or isinstance(base, nn.Embedding)):
        raise AdapterError(
            f"the adapter replaces {name}, a {type(base).__name__}; the engine replaces linear "
            "layers, embeddings and norms only"
        )
    if is_norm and any(tensor.shape != (width,) for tensor in parameters.values()):
        raise AdapterError(
            f"the adapter replaces {name}, a norm of each attention head; the engine replaces "
            "norms of whole hidden states only"
        )
    new = dict(base._parameters)
    if is_linear:  # a native layer may keep its weight in another form
        new = {"weight": getattr(base, "weight", None), "bias": base.bias}
    for part, tensor in parameters.items():
        old = new.get(part)
        # Also catches weights that are packed: bitsandbytes stores bytes in another shape.
        if old is None or old.shape != tensor.shape or not old.is_floating_point():
            raise AdapterError(
                f"the adapter replaces the {part} of {name}, which is quantized or has another "
                "shape in this base; serve it on the unquantized base"
            )
        new[part] = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
    return OwnModule(_linear(new, context) if is_linear else _like(base, new))


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
