"""GPTQ layers in the layout that the kernels read."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_serve.base.gptq import is_gptq

_BITS = (2, 4, 8)
_WIDTH = 16  # kernels.cpp's vector


@dataclass(frozen=True)
class PackedGptq:
    """A layer's weights: scale * (code - zero point)."""

    bits: int
    """2, 4 or 8."""
    codes: Tensor
    """int32 [out, blocks, 16], 32 / bits codes a word; see kernels.cpp"""
    groups: Tensor
    """float32 [out, groups, 2]: scale, and -scale * zero point"""
    shift: int
    """Input i is in group i >> shift."""
    order: Tensor | None
    """[in]: the layer's inputs in the order of the groups; None where they are in it."""


def pack_gptq(module: Any) -> PackedGptq | None:
    """The layer's weights for the kernels; None if it is no GPTQ layer, or one they do not read."""
    if not is_gptq(module) or module.qweight.device.type != "cpu" or module.bits not in _BITS:
        return None
    inside, is_odd = module.in_features, module.in_features % _WIDTH
    shift = _shift(module.group_size, inside)
    if shift is None or is_odd or module.scales.dtype != torch.float32:
        return None
    group_of = module.g_idx[:inside].long()
    order = torch.argsort(group_of, stable=True)
    if not group_of[order].equal(torch.arange(inside) >> shift):
        return None  # groups of unequal sizes
    codes = _unpack(module.qweight, module.bits, 0)[:inside][order].t()  # [out, in]
    zeros = _unpack(module.qzeros, module.bits, 1)[:, : module.out_features]
    groups = torch.stack((module.scales, -module.scales * zeros), 2)  # [groups, out, 2]
    is_ordered = bool(order.equal(torch.arange(inside)))
    return PackedGptq(
        bits=module.bits,
        codes=_in_words(codes, module.bits),
        groups=groups.transpose(0, 1).contiguous(),
        shift=shift,
        order=None if is_ordered else order,
    )


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """[out, in] → int32 [out, blocks, 16]; the last block is filled up with zeros."""
    parts = 32 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % (parts * _WIDTH)))
    blocks = padded.view(codes.shape[0], -1, parts, _WIDTH)
    words = torch.zeros_like(blocks[:, :, 0])
    for part in range(parts):
        words |= blocks[:, :, part] << (bits * part)
    return words.contiguous()


def _shift(group_size: int, inside: int) -> int | None:
    """log2 of the group size; one group when that is all inputs; None where it is no power of 2."""
    if group_size in (-1, inside):
        return 62
    is_power = group_size >= _WIDTH and group_size & (group_size - 1) == 0
    return group_size.bit_length() - 1 if is_power else None


def _unpack(packed: Tensor, bits: int, along: int) -> Tensor:
    """The codes in words of 32 bits, the first in the lowest bits, along a dimension: int32."""
    codes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(codes, along + 1).flatten(along, along + 1)
