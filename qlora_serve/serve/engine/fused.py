"""What stands between the matrix products, in one pass each: norms, gated activations, rotation.

A decoding step of few rows spends a third of its time in such small operators. Which module of a
model computes what is not read from its architecture's name: a module of the right form is tried
with random numbers beside the kernel, and replaced only where both agree.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_serve.serve.engine.kernels.native import Kernels

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # of the largest number; float32 in another order of operations
_ROWS = 3
_ROTATION = "apply_rotary_pos_emb"

_engine = threading.local()


@contextmanager
def engine_computes() -> Iterator[None]:
    """Within it, the models of this thread may be computed by the kernels.

    The rotation is a function that all models of a family share, so that replacing it would also
    reach models that are none of the engine's business.
    """
    _engine.computes = True
    try:
        yield
    finally:
        _engine.computes = False


class FusedNorm(nn.Module):
    """RMSNorm (arXiv:1910.07467) by one kernel."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self.eps, self.offset = eps, offset
        """The offset is 1 where the weight is stored as its distance from 1 (Gemma)."""
        self._kernel = kernels.rms_norm

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., n] → the same."""
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        n = hidden.shape[-1]
        self._kernel(
            hidden.data_ptr(), hidden.numel() // n, n, self.weight.data_ptr(), self.eps,
            self.offset, output.data_ptr(),
        )  # fmt: skip
        return output


def use_fused(model: Any, kernels: Kernels) -> None:
    """Replaces, in place, what the kernels compute just as well; the rest stays as it is."""
    counts = {"norms": 0, "gated activations": 0, "rotations": 0}
    for name, module in list(model.named_modules()):
        if (norm := _fused_norm(module, kernels)) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
            counts["norms"] += 1
        elif _has_gate(module) and _fuse_gate(module, kernels):
            counts["gated activations"] += 1
    families = {sys.modules[type(module).__module__] for module in model.modules()}
    counts["rotations"] = sum(_fuse_rotation(family, kernels) for family in families)
    log.debug("by one kernel each: %s", counts)


def _fused_norm(module: Any, kernels: Kernels) -> FusedNorm | None:
    weight: Any = module._parameters.get("weight")  # one in panels would be put together
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_candidate = (
        type(module).__name__.endswith("RMSNorm")
        and [*module._parameters] == ["weight"]
        and not module._modules
        and isinstance(eps, float)
        and weight.dim() == 1
        and weight.dtype == torch.float32
    )
    if not is_candidate:
        return None
    hidden = _random(1, _ROWS, weight.shape[0])
    with torch.inference_mode():
        expected = module(hidden)
        for offset in (0.0, 1.0):
            fused = FusedNorm(weight, eps, offset, kernels)
            if _agree(fused(hidden), expected):
                return fused
    return None


def _has_gate(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return set(module._modules) == set(parts) and not module._parameters


def _fuse_gate(block: Any, kernels: Kernels) -> bool:
    """Gives a block another `forward`, if it computes down(silu(gate(x)) * up(x))."""

    def forward(hidden: Tensor) -> Tensor:
        gate, up = block.gate_proj(hidden), block.up_proj(hidden)
        kernels.silu_product(gate.data_ptr(), up.data_ptr(), gate.numel(), gate.data_ptr())
        output: Tensor = block.down_proj(gate)
        return output

    width = getattr(block.gate_proj, "in_features", None)
    inner = getattr(block.gate_proj, "out_features", 1)
    if width is None or inner % 16:
        return False
    hidden = _random(1, _ROWS, width)
    with torch.inference_mode():
        outputs = block.gate_proj(hidden), block.up_proj(hidden)
        if any(out.dtype != torch.float32 or not out.is_contiguous() for out in outputs):
            return False
        if not _agree(forward(hidden), block(hidden)):
            return False
    block.forward = forward
    return True


def _fuse_rotation(family: ModuleType, kernels: Kernels) -> bool:
    """Replaces a family's rotation of queries and keys while the engine computes."""
    original = getattr(family, _ROTATION, None)
    if original is None:
        return False
    if hasattr(original, "qlora_serve_original"):
        return True

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **others: Any) -> Any:
        is_ours = getattr(_engine, "computes", False) and not more and not others
        if is_ours and all(_can_rotate(x, cos, sin) for x in (q, k)):
            cos, sin = cos.contiguous(), sin.contiguous()
            return tuple(_rotated(kernels, x, cos, sin) for x in (q, k))
        return original(q, k, cos, sin, *more, **others)

    q, k = _random(1, 4, _ROWS, 32), _random(1, 2, _ROWS, 32)
    cos, sin = _random(1, _ROWS, 32), _random(1, _ROWS, 32)
    try:
        with torch.inference_mode(), engine_computes():
            same = zip(rotation(q, k, cos, sin), original(q, k, cos, sin), strict=True)
            if not all(_agree(found, expected) for found, expected in same):
                return False
    except Exception:  # a rotation of another form
        log.debug("%s.%s is not the usual one", family.__name__, _ROTATION, exc_info=True)
        return False
    rotation.qlora_serve_original = original  # type: ignore[attr-defined]
    setattr(family, _ROTATION, rotation)
    return True


def _can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.shape[0] == 1
        and cos.shape == sin.shape == (1, x.shape[2], x.shape[3])
        and x.dtype == cos.dtype == torch.float32
        and x.stride(3) == 1
        and x.shape[3] % 32 == 0
        and x.device.type == "cpu"
    )


def _rotated(kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _, heads, rows, dim = x.shape
    output = x.new_empty(1, rows, heads, dim)
    kernels.rotate(
        x.data_ptr(), x.stride(1), x.stride(2), heads, rows, dim, cos.data_ptr(), sin.data_ptr(),
        output.data_ptr(),
    )  # fmt: skip
    return output.transpose(1, 2)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
