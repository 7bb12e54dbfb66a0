"""bitsandbytes' own int8 layers, asked for one row at a time.

Over several rows it takes every column with a large number in any of them out of the 8 bits, so
that a row's result depends on the others: what a row is alone, it says only when it is alone.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

# It warns of its cast to float16 at every call.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def row_by_row(model: Any) -> None:
    """Changes a model's int8 layers, in place."""
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Int8Params":
            module.forward = _by_rows(module.forward)


def _by_rows(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def each(hidden: torch.Tensor) -> torch.Tensor:
        rows = [forward(row[None]) for row in hidden.reshape(-1, hidden.shape[-1])]
        return torch.cat(rows).view(*hidden.shape[:-1], -1)

    return each
