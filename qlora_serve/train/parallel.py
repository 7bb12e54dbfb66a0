"""What the processes of one run tell each other. A run of one process needs none of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qlora_serve.errors import TrainError

Value = TypeVar("Value")


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which process of this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process reports and writes for all."""
    return rank() == 0


def shared(value: Value) -> Value:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_split(model: Any) -> bool:
    """Whether each process holds only a part of a model's weights (ZeRO-3, FSDP)."""
    return any(hasattr(weight, "ds_id") or is_part(weight) for weight in model.parameters())


def is_part(parameter: Any) -> bool:
    """Whether a parameter is split by FSDP: a distributed tensor, of which this is one part."""
    return hasattr(parameter, "placements")


def any_of(asked: bool) -> bool:
    """Whether it holds in any process."""
    return any(_gather(asked))


@contextmanager
def together() -> Iterator[None]:
    """Runs a part that each process must get through; if one fails, all do.

    Without it, the others would wait for the failed one at their next exchange.

    Raises:
        QloraServeError: this process's own, or one that repeats what another said.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            _gather(str(error) or type(error).__name__)
        raise
    if world_size() == 1:
        return
    failed = [
        (number, message) for number, message in enumerate(_gather(None)) if message is not None
    ]
    if failed:
        raise PeerError(*failed[0])


class PeerError(TrainError):
    """Another process of the run failed."""

    def __init__(self, number: int, message: str) -> None:
        self.number = number
        super().__init__(message)


def _gather(value: Any) -> list[Any]:
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
