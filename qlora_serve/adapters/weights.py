"""An adapter's weights in the form that is applied: one low-rank pair a module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.peft_config import unsupported_settings
from qlora_serve.errors import AdapterError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update of one linear layer: `y += scaling * B(A(x))` (arXiv:2106.09685)."""

    a: Any
    """[rank, in_features]"""
    b: Any
    """[out_features, rank]"""
    scaling: float

    @property
    def size_bytes(self) -> int:
        """Bytes of both matrices."""
        return int(self.a.nbytes + self.b.nbytes)


@dataclass(frozen=True)
class AdapterWeights:
    """All that the engine needs of an adapter, checked."""

    identity: str
    """See `identity.content_identity`."""
    modules: Mapping[str, LoraPair]
    """The path of a linear layer in the base model → its update."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(pair.size_bytes for pair in self.modules.values())

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(pair.a.shape[0] for pair in self.modules.values())

    @property
    def is_dead(self) -> bool:
        """Whether every update is exactly zero, as right after initialisation."""
        return all(
            pair.scaling == 0 or not pair.b.any() or not pair.a.any()
            for pair in self.modules.values()
        )


def load_weights(adapter: AdapterFiles, fit: FitChecker) -> AdapterWeights:
    """Reads and checks an adapter for a base: right, or refused.

    Raises:
        AdapterError: it does not fit the base, asks for what cannot be applied exactly, or holds
            NaN or infinite values.
    """
    expected = fit.check(adapter)
    reasons = unsupported_settings(adapter.config)
    if reasons:
        raise AdapterError(
            f"adapter {adapter.path} needs what the engine cannot apply: {', '.join(reasons)}"
        )
    tensors = adapter.load_tensors()
    check_finite(adapter, tensors)
    modules = {}
    for name, module in expected.modules.items():
        stem = _PREFIX + name
        names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
        if any(part not in tensors for part in names):
            raise AdapterError(
                f"adapter {adapter.path} targets {name}, which is not a linear layer; the engine "
                "applies LoRA to linear layers only"
            )
        a, b = (tensors[part] for part in names)
        modules[name] = LoraPair(a, b, module.scaling)
    return AdapterWeights(content_identity(adapter, tensors), modules)


def check_finite(adapter: AdapterFiles, tensors: Mapping[str, Any]) -> None:
    """Raises:
    AdapterError: a tensor holds NaN or an infinity; the first three are named.
    """
    bad = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
    if bad:
        raise AdapterError(
            f"adapter {adapter.path} holds NaN or infinite values in {len(bad)} tensors "
            f"({', '.join(bad[:3])}); its training diverged"
        )
