"""Sequences for tests of the scheduler, and one step of it; without torch."""

from dataclasses import dataclass

from qlora_serve.serve.engine.request import GenerationRequest, Sampling, Sequence
from qlora_serve.serve.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Adapter:
    key: str


def sequence_of(
    number: int, prompt: int, max_tokens: int, adapter: str | None = None, start: int = 0, **more
) -> Sequence:
    chosen = None if adapter is None else Adapter(adapter)
    tokens = tuple(range(start, start + prompt))
    request = GenerationRequest(str(number), tokens, Sampling(max_tokens), chosen, **more)
    return Sequence(request, deliver=lambda event: None)


def run_step(scheduler: Scheduler) -> list[Sequence]:
    """One step; returns who was in it."""
    step = scheduler.schedule()
    for chunk in step.chunks:
        samples = chunk.samples
        scheduler.record(chunk)
        if samples:
            chunk.sequence.generated.append(9)
    return [chunk.sequence for chunk in step.chunks]
