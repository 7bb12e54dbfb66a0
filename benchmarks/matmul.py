"""Products of float32 matrices in training: torch's own beside oneDNN's.

    python benchmarks/matmul.py

One thread; the least processor time of eight repeats, since other programs may share the machine.
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from qlora_serve.base.matmul import linear, product

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (16, 576), (49152, 576)]
TOKENS = (85, 300, 512)
_REPEATS = 8


def main() -> None:
    """Prints GFLOP/s by the shape of the weight, [out, in], and the number of tokens."""
    torch.set_num_threads(1)
    table = Table(title="GFLOP/s of one thread")
    for heading in ("tokens", "weight", "torch", "oneDNN", "gradient, torch", "gradient, oneDNN"):
        table.add_column(heading, justify="right")
    for tokens in TOKENS:
        for outside, inside in SHAPES:
            rates = _rates(tokens, outside, inside)
            shown = (f"{rate:.0f}" for rate in rates)
            table.add_row(str(tokens), f"{outside} × {inside}", *shown)
    Console().print(table)


def _rates(tokens: int, outside: int, inside: int) -> list[float]:
    x, weight = torch.randn(tokens, inside), torch.randn(outside, inside)
    gradient = torch.randn(tokens, outside)
    ways: list[Callable[[], Tensor]] = [
        lambda: functional.linear(x, weight),
        lambda: linear(x, weight),
        lambda: gradient @ weight,
        lambda: product(gradient, weight),
    ]
    operations = 2 * tokens * outside * inside
    return [operations / _least_seconds(way) / 1e9 for way in ways]


def _least_seconds(way: Callable[[], Tensor]) -> float:
    for _ in range(2):
        way()
    found = []
    for _ in range(_REPEATS):
        begun = time.thread_time()
        way()
        found.append(time.thread_time() - begun)
    return min(found)


if __name__ == "__main__":
    main()
