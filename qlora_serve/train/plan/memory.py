"""The parts of a plan; all memory is in bytes."""

from pydantic import BaseModel, ConfigDict

GRADIENT_BYTES = 4
"""Of each number that is trained."""


class Frozen(BaseModel):
    """A part of a plan."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class TrainingMemory(Frozen):
    """The peak of training in one process, and what it is made of."""

    weights: int
    """The frozen base (or the model that is trained whole)."""
    adapter: int
    """What is trained, in float32."""
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs, logits and passing tensors, at the fullest moment."""
    communication: int = 0
    """Buckets and gathered layers of several processes."""
    heap: int = 0
    """On a CPU: gaps in the heap, and what the program itself takes."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.model_dump().values())


class StageMemory(Frozen):
    """Training on several processes."""

    stage: str
    """`single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`."""
    processes: int
    memory: TrainingMemory
    """Of one process."""
    note: str = ""


class ServingMemory(Frozen):
    """The peak of serving."""

    weights: int
    adapters: int
    kv_cache: int
    """Of all requests at their full length."""
    step: int
    """Passing tensors of one step."""
    kv_bytes_per_token: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.kv_cache + self.step


class Parameters(Frozen):
    """How many numbers there are."""

    total: int
    """Base and adapter together."""
    trainable: int
    by_component: dict[str, int]

    @property
    def share(self) -> float:
        """Trainable of all, in per cent."""
        return 100 * self.trainable / self.total


class Plan(Frozen):
    """What `plan` found."""

    base: str
    model_type: str
    quantization: str
    dtype: str
    device: str
    micro_batch: int
    max_length: int
    gradient_checkpointing: bool
    parameters: Parameters
    training: TrainingMemory
    stages: list[StageMemory]
    serving: ServingMemory
    context: int
    max_sequences: int
