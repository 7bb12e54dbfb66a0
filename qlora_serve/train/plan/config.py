"""What `qlora-serve plan` is told: a training recipe, and how it will be served."""

from typing import Any

from pydantic import Field

from qlora_serve.train.config import TrainSettings


class PlanSettings(TrainSettings):
    """Every key of a training recipe, and a few more.

    Keys that move no memory (the learning rate, the data) are taken and checked as training does,
    so that a recipe can be planned as it is.
    """

    # A plan needs neither; both stay, so that a recipe's file fits.
    data: Any = None
    """The training data; not read by a plan."""
    output: Any = None
    """The adapter directory; not touched by a plan."""

    trained_share: float = Field(1.0, gt=0, le=1)
    """The share of tokens that count in the loss; 1 is the worst case. Logits, the largest tensor
    of a step with a large vocabulary, exist only for these."""
    context: int | None = Field(None, ge=1)
    """For serving: tokens of prompt and answer of one request; by default the training length."""
    max_sequences: int = Field(8, ge=1)
    """For serving: requests that run at the same time."""
    adapters: int = Field(1, ge=0)
    """For serving: adapters like this one, in memory at the same time."""
    as_json: bool = Field(default=False, alias="json")
    """Print the plan as JSON."""
