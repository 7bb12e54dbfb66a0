"""How the rows of an output tensor come from the base's and the adapter's, a block at a time.

Each recipe computes in float32, in PEFT's own order of operations, so that its rows, cast once, are
those of `merge_and_unload` followed by one cast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import frexp, sqrt
from typing import Any, Protocol

import torch

from qlora_serve.base.matmul import product
from qlora_serve.merge.tensor_files import RowSource

# One row alone would go through another routine, with another order of additions.
_LEAST_ROWS = 2


@dataclass
class Change:
    """Sums of squares over the rows that were made: what the change of a weight is told from."""

    old: float = 0.0
    """Of the base's values."""
    difference: float = 0.0
    """Of new values less old ones."""

    def add(self, other: "Change") -> None:
        """Adds those of other rows."""
        self.old += other.old
        self.difference += other.difference

    @property
    def relative(self) -> float:
        """‖new - old‖ / ‖old‖."""
        change = sqrt(self.difference)
        return change / sqrt(self.old) if self.old else change


class RowRecipe(Protocol):
    """An output tensor that is made by rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def blocks(self, first: int, count: int, change: Change) -> Iterator[Any]:
        """Blocks of its rows from `first` on, in order, in any dtype.

        Each is valid until the next is asked for.
        """


@dataclass(frozen=True)
class _OfOneSource:
    """What is made of one tensor's rows, and has its shape."""

    source: RowSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True)
class Copied(_OfOneSource):
    """The rows as they are."""

    def blocks(self, first: int, count: int, change: Change) -> Iterator[Any]:
        for _, block in self.source.rows(_LEAST_ROWS, first, count):
            yield block


@dataclass(frozen=True)
class Replaced:
    """The rows that the adapter brings, whole (`modules_to_save`)."""

    new: RowSource
    old: RowSource | None
    """The base's; None when they have another size, as in an enlarged vocabulary."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.new.shape

    def blocks(self, first: int, count: int, change: Change) -> Iterator[Any]:
        if self.old is None:
            change.add(Change(1.0, 1.0))  # there is nothing to compare with: all of it is new
            yield from Copied(self.new).blocks(first, count, change)
            return
        pairs = zip(
            self.new.rows(_LEAST_ROWS, first, count),
            self.old.rows(_LEAST_ROWS, first, count),
            strict=True,
        )
        for (_, new), (_, old) in pairs:
            before = old.float()
            change.add(Change(_square(before), _square(new.float() - before)))
            yield new


@dataclass(frozen=True)
class WithTokens(_OfOneSource):
    """The rows with those of trained tokens in their places (`trainable_token_indices`)."""

    tokens: list[int]
    trained: Any
    """[tokens, width], float32"""

    def blocks(self, first: int, count: int, change: Change) -> Iterator[Any]:
        for start, block in self.source.rows(_LEAST_ROWS, first, count):
            rows = block.float()
            change.old += _square(rows)
            for number, token in enumerate(self.tokens):
                place = token - start
                if 0 <= place < len(rows):
                    change.difference += _square(self.trained[number] - rows[place])
                    rows[place] = self.trained[number]
            yield rows


@dataclass(frozen=True)
class Updated(_OfOneSource):
    """`W + scaling B A`; with DoRA its rows are then scaled to their trained lengths."""

    a: Any
    """[rank, in], float32"""
    b: Any
    """[out, rank], float32"""
    scaling: float
    is_embedding: bool = False
    """Whether W is [in, out]: `W + scaling (B A)ᵀ`."""
    lengths: Any = None
    """[out]: the rows' lengths that DoRA trained (arXiv:2402.09353)."""
    _is_exact: bool = field(init=False)

    def __post_init__(self) -> None:
        # Multiplying by a power of two rounds nothing, so that it may be part of the addition.
        object.__setattr__(self, "_is_exact", abs(frexp(self.scaling)[0]) == 0.5)

    def blocks(self, first: int, count: int, change: Change) -> Iterator[Any]:
        scratch: Any = None
        for start, block in self.source.rows(_LEAST_ROWS, first, count):
            if scratch is None or len(scratch) < len(block):
                scratch = torch.empty(block.shape)
            weight = scratch[: len(block)].copy_(block)
            change.old += _square(weight)
            rows = slice(start, start + len(block))
            if self.is_embedding:
                delta = (self.b @ self.a[:, rows]).T.contiguous()
            else:
                delta = _product(self.b[rows], self.a)
            if self._is_exact:
                weight.add_(delta, alpha=self.scaling)
            else:
                weight.add_(delta.mul_(self.scaling))
            if self.lengths is not None:
                factor = self.lengths[rows] / torch.linalg.norm(weight, dim=1)
                weight.mul_(factor.view(-1, 1))
                change.difference += _square(delta.copy_(block).sub_(weight))
            yield weight
        if first == 0 and self.lengths is None:
            change.difference += self._update_square()

    def _update_square(self) -> float:
        """‖scaling B A‖² (Frobenius), without B A: from the trace of (A Aᵀ) (Bᵀ B)."""
        inside, outside = self.a @ self.a.T, self.b.T @ self.b
        return self.scaling**2 * max(0.0, float((inside.double() * outside).sum()))


@dataclass(frozen=True)
class MadeByPeft:
    """A tensor that only PEFT's layer can make, as a whole."""

    shape: tuple[int, ...]
    make: Callable[[Change], Any]


Recipe = RowRecipe | MadeByPeft


def _product(b: Any, a: Any) -> Any:
    """B A to the last bit as torch, and so PEFT, computes it; by oneDNN where that does too."""
    rows, rank = b.shape
    return product(b, a) if _has_torchs_order(rows, rank, a.shape[1]) else torch.mm(b, a)


@cache
def _has_torchs_order(rows: int, rank: int, width: int) -> bool:
    """Whether oneDNN adds up products of these shapes in the order of torch's own routine."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(rows, rank, generator=generator)
    a = torch.randn(rank, width, generator=generator)
    return bool(product(b, a).equal(torch.mm(b, a)))


def _square(tensor: Any) -> float:
    flat = tensor.flatten()
    return float(torch.dot(flat, flat))
