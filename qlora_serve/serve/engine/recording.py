"""What one run of a model's decoder layers did: for `replay`, which makes the same calls again."""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_IGNORED = ("position_ids", "cache_position")  # what the rotation's tables were made from
_NEW = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
}


class NotRecordableError(Exception):
    """The layers do something that a replay would not do."""


@dataclass
class Recorded:
    """What one run of the layers did."""

    calls: list[tuple[str, int | None, list[int], list[float]]] = field(default_factory=list)
    """Kind, the index of the adapter layer or the group of the cache, integers, floats."""
    storages: list[Tensor] = field(default_factory=list)
    """The layers' inputs and everything that was written, alive so that no address comes twice."""
    inputs: int = 0
    """How many of them are inputs."""
    output: Tensor | None = None
    """Of the layer that ran last."""
    is_inside: bool = False
    """Whether the layers are running, not what is before or after them."""
    _by_address: list[tuple[int, int]] = field(default_factory=list)

    def sort(self) -> None:
        """To be called when everything was recorded, before `place`."""
        first: dict[int, int] = {}
        for number, held in enumerate(self.storages):
            first.setdefault(held.untyped_storage().data_ptr(), number)
        self._by_address = sorted(first.items())

    def place(self, address: int) -> tuple[int, int] | None:
        """The storage that an address is in, and how far behind its beginning."""
        before = bisect_right(self._by_address, (address, len(self.storages)))
        if before == 0:
            return None
        begin, number = self._by_address[before - 1]
        is_inside = address - begin < self.storages[number].untyped_storage().nbytes()
        return (number, address - begin) if is_inside else None


class Watch(TorchDispatchMode):
    """Notes what torch itself computes meanwhile."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self._recorded = recorded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        aliases = [one.alias_info for one in func._schema.returns]
        if aliases and all(one is not None and not one.is_write for one in aliases):
            return found  # a view
        if func in _NEW:
            self._recorded.storages.append(found)
        elif func is torch.ops.aten.add.Tensor and not kwargs and _can_add(*args):
            self._recorded.storages.append(found)
            addresses = [tensor.data_ptr() for tensor in (*args, found)]
            self._recorded.calls.append(("add", None, [*addresses, found.numel()], []))
        else:
            raise NotRecordableError(f"{func}")
        return found


def _can_add(left: Any, right: Any) -> bool:
    tensors = (left, right)
    return (
        all(isinstance(one, Tensor) and one.is_contiguous() for one in tensors)
        and all(one.dtype == torch.float32 for one in tensors)
        and left.shape == right.shape
    )


def layer_inputs(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What a layer is given anew in each step: hidden states, and the rotation's tables."""
    tensors = [hidden, *(kwargs.get("position_embeddings") or ())]
    others = [name for name, value in kwargs.items()
              if isinstance(value, Tensor) and name not in _IGNORED]  # fmt: skip
    if others or args:
        raise NotRecordableError(f"the layers are given {', '.join(others) or 'more'}")
    for one in tensors:
        if not isinstance(one, Tensor) or one.dtype != torch.float32 or not one.is_contiguous():
            raise NotRecordableError("the layers' inputs are not contiguous floats")
        if one.dim() != 3 or one.shape[0] != 1:
            raise NotRecordableError("the layers' inputs are not rows")
    return tensors


def goes_on(recorded: Recorded, given: list[Tensor]) -> bool:
    """Whether a layer begins where the one before ended, and is given what the first was."""
    assert recorded.output is not None
    same = recorded.storages[1 : recorded.inputs]
    return given[0].data_ptr() == recorded.output.data_ptr() and [
        one.data_ptr() for one in given[1:]
    ] == [one.data_ptr() for one in same]
