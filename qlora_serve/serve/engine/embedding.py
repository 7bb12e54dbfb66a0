"""Embeddings and output heads: their sizes, and one weight in panels where they share it."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.serve.engine.coded import from_panels
from qlora_serve.serve.engine.kernels.native import Kernels

_TRIED = 64


class PanelEmbedding(nn.Module):
    """Looks its rows up in the panels of the output head, so that their weight is held once.

    Args:
        embedding: whose place it takes, see `can_look_up`.
        panels: its weight, float32 [tokens / 32 rounded up, width, 32].
        kernels: that look up.
    """

    def __init__(self, embedding: nn.Embedding, panels: Tensor, kernels: Kernels) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.embed_scale = _scale(embedding)
        self.panels = panels
        self._look_up = kernels.look_up
        # In a tuple, so that it is no part of the model.
        self._like = (_with_weight(embedding, None),)

    def forward(self, ids: Tensor) -> Tensor:
        """[1, rows] → [1, rows, embedding_dim]"""
        ids = ids.contiguous()
        output = torch.empty(*ids.shape, self.embedding_dim)
        unknown = self._look_up(
            ids.data_ptr(), ids.numel(), self.panels.data_ptr(), self.num_embeddings,
            self.embedding_dim, self.embed_scale, output.data_ptr(),
        )  # fmt: skip
        if unknown:
            raise IndexError(f"{unknown} ids are not below {self.num_embeddings}")
        return output

    @property
    def weight(self) -> Tensor:
        """The weight [num_embeddings, embedding_dim], put together anew."""
        return from_panels(self.panels, self.num_embeddings)

    def with_weight(self, weight: nn.Parameter) -> nn.Embedding:
        """The module whose place this one took, with another weight."""
        return _with_weight(self._like[0], weight)


def can_look_up(module: Any) -> bool:
    """Whether a module only looks up rows of its weight, and multiplies them by `embed_scale`.

    A subclass is tried: Gemma's multiplies its rows by the root of their length.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if type(module) is nn.Embedding:
        return True
    if [*module._parameters] != ["weight"]:
        return False
    ids = torch.linspace(0, module.num_embeddings - 1, _TRIED).long()[None]
    with torch.inference_mode():
        expected = module(ids)
        return torch.equal(F.embedding(ids, module.weight) * _scale(module), expected)


# A weight in panels is put together anew whenever it is asked for: what follows does not ask.


def width_of(embedding: Any) -> int:
    """The length of an embedding's rows."""
    return int(_of_base(embedding).embedding_dim)


def tokens_of(module: Any) -> int:
    """How many tokens an embedding or an output head has rows for."""
    base = _of_base(module)
    return int(base.num_embeddings if hasattr(base, "num_embeddings") else base.out_features)


def held_weight(module: Any) -> Tensor:
    """The tensor that holds a module's weight, in whatever order; shared where that is shared."""
    base = _of_base(module)
    held: Tensor = base.panels if hasattr(base, "panels") else base.weight
    return held


def _of_base(module: Any) -> Any:
    """The base's own module, under whatever the engine put around it for adapters."""
    while "base" in module._modules:
        module = module._modules["base"]
    return module


def _scale(embedding: Any) -> float:
    return float(getattr(embedding, "embed_scale", 1.0))


def _with_weight(embedding: nn.Embedding, weight: nn.Parameter | None) -> nn.Embedding:
    other = copy.copy(embedding)
    other._parameters = {"weight": weight}
    return other
