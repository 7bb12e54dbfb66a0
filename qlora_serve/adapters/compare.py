"""How large an adapter's updates are, and how far two adapters are apart, layer by layer.

Nothing of the size [out, in] is built: ⟨s₁B₁A₁, s₂B₂A₂⟩ = s₁s₂ ⟨B₁ᵀB₂, A₁A₂ᵀ⟩, both [r₁, r₂].
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.peft_config import answer_shaping_settings
from qlora_serve.adapters.weights import AdapterWeights, LoraPair

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LayerComparison:
    """The updates of two adapters in one layer, all its modules taken together."""

    first: float
    """Frobenius norm of the first adapter's updates."""
    second: float
    cosine: float | None
    """Between the two, as vectors; None where one of them is zero."""
    difference: float
    """Norm of their difference, as a share of the larger of the two; 0 where both are zero."""


def layer_norms(weights: AdapterWeights) -> dict[str, float]:
    """Layer → Frobenius norm of all its updates `scaling * B A`.

    A layer far from the others, or one at 0, shows where training went wrong. A module outside
    the numbered layers stands under its own name.
    """
    squares: dict[str, float] = defaultdict(float)
    for name, pair in weights.modules.items():
        squares[layer_of(name)] += max(0.0, _inner(pair, pair))
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def compare_layers(first: AdapterWeights, second: AdapterWeights) -> dict[str, LayerComparison]:
    """Layer → how the low-rank updates of two adapters compare; a missing module counts as zero.

    DoRA's magnitudes are not part of it: what they do depends on the base's weights.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name in [*first.modules, *(n for n in second.modules if n not in first.modules)]:
        one, two = first.modules.get(name), second.modules.get(name)
        total = sums[layer_of(name)]
        total[0] += _inner(one, one) if one is not None else 0.0
        total[1] += _inner(two, two) if two is not None else 0.0
        if one is not None and two is not None and _same_shape(one, two):
            total[2] += _inner(one, two)
    return {layer: _comparison(*total) for layer, total in sums.items()}


def compare_settings(first: AdapterFiles, second: AdapterFiles) -> dict[str, tuple[Any, Any]]:
    """The settings that shape answers and differ, and the base; None where one has none."""
    one = dict(answer_shaping_settings(first.config)) | {"base": first.base_name}
    two = dict(answer_shaping_settings(second.config)) | {"base": second.base_name}
    names = sorted(one.keys() | two.keys())
    return {n: (one.get(n), two.get(n)) for n in names if one.get(n) != two.get(n)}


def compare_others(first: AdapterWeights, second: AdapterWeights) -> dict[str, float | None]:
    """What differs besides the updates (biases, whole modules, magnitudes, rows of tokens).

    Returns:
        Name → largest absolute difference, or None where only one has it or shapes differ.
    """
    one, two = _others(first), _others(second)
    found: dict[str, float | None] = {}
    for name in sorted(one.keys() | two.keys()):
        a, b = one.get(name), two.get(name)
        if a is None or b is None or a.shape != b.shape:
            found[name] = None
        elif not a.equal(b):
            found[name] = float((a.double() - b.double()).abs().max())
    return found


def dead_modules(weights: AdapterWeights) -> list[str]:
    """The target modules whose low-rank update is zero: A or B is, or the scaling."""
    return [name for name, pair in weights.modules.items() if _inner(pair, pair) <= 0.0]


def layer_of(module: str) -> str:
    """The number of the layer that a module is in, or its own name."""
    found = _LAYER.search(f".{module}.")
    return found[1] if found else module


def _inner(one: LoraPair, two: LoraPair) -> float:
    b = one.b.double().T @ two.b.double()  # [r1, r2]
    a = one.a.double() @ two.a.double().T  # [r1, r2]
    return float((b * a).sum()) * one.scaling * two.scaling


def _same_shape(one: LoraPair, two: LoraPair) -> bool:
    return one.a.shape[1] == two.a.shape[1] and one.b.shape[0] == two.b.shape[0]


def _comparison(first: float, second: float, inner: float) -> LayerComparison:
    one, two = math.sqrt(max(0.0, first)), math.sqrt(max(0.0, second))
    larger = max(one, two)
    difference = math.sqrt(max(0.0, first + second - 2 * inner))
    return LayerComparison(
        one,
        two,
        max(-1.0, min(1.0, inner / (one * two))) if one and two else None,
        difference / larger if larger else 0.0,
    )


def _others(weights: AdapterWeights) -> Mapping[str, Any]:
    found: dict[str, Any] = {f"{name}.bias": bias for name, bias in weights.biases.items()}
    for name, parts in weights.replaced.items():
        found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    found |= {f"{name} (rows of tokens)": rows.rows for name, rows in weights.token_rows.items()}
    for name, pair in weights.modules.items():
        if pair.magnitude is not None:
            found[f"{name} (magnitude)"] = pair.magnitude
        if pair.b_bias is not None:
            found[f"{name} (bias of B)"] = pair.b_bias
    return found
