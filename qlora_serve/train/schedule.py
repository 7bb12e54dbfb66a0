"""The learning rate over a run."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def warmup_steps(ratio: float, total: int) -> int:
    """The steps of a run in which the learning rate rises."""
    return math.ceil(ratio * total)


def rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """What the highest learning rate is multiplied with.

    No step is wasted on a rate of zero: the first step of the warm-up takes its share, and the
    last step of the run is still above zero.

    Args:
        step: how many steps are done.
        total: the steps of the run.
        warmup: the steps of the rise.
        schedule: how the rate goes on after that.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
