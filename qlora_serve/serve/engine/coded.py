"""Quantized layers in the layout that the kernels read: panels of codes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_serve.base.gptq import is_gptq
from qlora_serve.serve.engine.host_memory import Arena

PANEL = 32
"""Outputs of a panel; panels.h has the same number."""
_GPTQ_BITS = (2, 4, 8)
_LEAST_GROUP = 16
_ONE_GROUP = 62  # a shift that leaves no input in another group
_NF4_BLOCK = 64


@dataclass(frozen=True)
class CodedWeights:
    """A layer's weights: table[code] * scale + offset, or code * scale + offset with 8 bits."""

    bits: int
    """4 or 8."""
    codes: Tensor
    """int32 [panels, in * bits / 32, 32]: a word holds several inputs of one output"""
    scales: Tensor
    """float32 [panels, groups, 32]"""
    offsets: Tensor | None
    """float32 [panels, groups, 32]; None for none"""
    table: Tensor
    """float32 [16]"""
    shift: int
    """Input i is in group i >> shift."""
    order: Tensor | None
    """[in]: the layer's inputs in the order of the groups; None where they are in it."""
    out_features: int

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.codes.shape[1] * 32 // self.bits


def code_nf4(module: Any, arena: Arena | None = None) -> CodedWeights | None:
    """The weights of an NF4 layer of bitsandbytes; None if it is none, or one with other blocks."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ != "Params4bit" or not _is_ready(weight, torch.uint8):
        return None
    state = weight.quant_state
    is_known = (
        state.quant_type == "nf4"
        and state.blocksize == _NF4_BLOCK
        and state.dtype == torch.float32
        and state.shape[1] % _NF4_BLOCK == 0
        and module.compute_dtype in (None, torch.float32)
        and not getattr(state, "packing_format_for_cpu", False)
    )
    if not is_known:
        return None
    out_features, in_features = state.shape
    packed = weight.data.view(out_features, in_features // 2)
    codes = torch.stack((packed >> 4, packed & 15), 2).flatten(1)  # the first in the upper half
    scales = _nf4_scales(state).view(out_features, -1)
    return CodedWeights(
        bits=4,
        codes=_in_words(in_panels(codes), 4, arena),
        scales=in_panels(scales, arena),
        offsets=None,
        table=state.code.float().contiguous(),
        shift=_NF4_BLOCK.bit_length() - 1,
        order=None,
        out_features=out_features,
    )


def code_gptq(module: Any, arena: Arena | None = None) -> CodedWeights | None:
    """The weights of a GPTQ layer; None if it is none, or one that the kernels do not read."""
    if not is_gptq(module) or module.qweight.device.type != "cpu" or module.bits not in _GPTQ_BITS:
        return None
    inside = module.in_features
    shift = _shift(module.group_size, inside)
    if shift is None or inside % 8 or module.scales.dtype != torch.float32:
        return None
    group_of = module.g_idx[:inside].long()
    order = torch.argsort(group_of, stable=True)
    if not group_of[order].equal(torch.arange(inside) >> shift):
        return None  # groups of unequal sizes
    codes = _unpack(module.qweight, module.bits, 0)[:inside][order].t().to(torch.uint8)
    zeros = _unpack(module.qzeros, module.bits, 1)[:, : module.out_features]
    bits = 8 if module.bits == 8 else 4  # 2 bits are stored as 4
    is_ordered = bool(order.equal(torch.arange(inside)))
    return CodedWeights(
        bits=bits,
        codes=_in_words(in_panels(codes), bits, arena),
        scales=in_panels(module.scales.t(), arena),
        offsets=in_panels((-module.scales * zeros).t(), arena),
        table=torch.arange(16, dtype=torch.float32),
        shift=shift,
        order=None if is_ordered else order,
        out_features=module.out_features,
    )


def from_panels(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of `in_panels`."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features]


def in_panels(values: Tensor, arena: Arena | None = None) -> Tensor:
    """[out, n] → [panels, n, 32], filled up with zeros."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % PANEL))
    panels = padded.view(-1, PANEL, values.shape[1]).transpose(1, 2)
    return panels.contiguous() if arena is None else arena.copy(panels)


def _in_words(codes: Tensor, bits: int, arena: Arena | None) -> Tensor:
    """[panels, in, 32] → int32 [panels, in * bits / 32, 32], the first input in the lowest bits."""
    parts = 32 // bits
    split = codes.int().unflatten(1, (-1, parts))
    words = torch.zeros_like(split[:, :, 0])
    for part in range(parts):
        words |= split[:, :, part] << (bits * part)
    return words.contiguous() if arena is None else arena.copy(words)


def _nf4_scales(state: Any) -> Tensor:
    """The scale of each block of 64 weights, float32; themselves unpacked if they are quantized."""
    if not state.nested:
        return state.absmax.float().contiguous()
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float().contiguous()


def _shift(group_size: int, inside: int) -> int | None:
    """log2 of the group size; one group when that is all inputs; None where it is no power of 2."""
    if group_size in (-1, inside):
        return _ONE_GROUP
    is_power = group_size >= _LEAST_GROUP and group_size & (group_size - 1) == 0
    return group_size.bit_length() - 1 if is_power else None


def _unpack(packed: Tensor, bits: int, along: int) -> Tensor:
    """The codes in words of 32 bits, the first in the lowest bits, along a dimension: int32."""
    codes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(codes, along + 1).flatten(along, along + 1)


def _is_ready(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous()
