"""A registry of adapters and an engine, without HTTP, and what they answer."""

import queue
from pathlib import Path
from typing import Any

from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits

PROMPT = tuple(range(10, 30))
COUNT = 6  # adapters, of different ranks


class Server:
    """A registry and an engine, without HTTP."""

    def __init__(self, runner: Runner, **limits: int) -> None:
        self.registry = AdapterRegistry(runner, **limits)
        self.engine = Engine(runner, Limits(8, 4000, 64, 400), self.registry.residency)
        self.registry.residency.wake = self.engine.wake
        self.engine.start()
        self._count = 0

    def ask(self, adapter: Any, max_tokens: int = 24) -> "queue.Queue[Event]":
        events: queue.Queue[Event] = queue.Queue()
        self._count += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        if isinstance(adapter, str):
            adapter = self.registry.resolve(adapter)
        self.engine.submit(
            GenerationRequest(f"r{self._count}", PROMPT, sampling, adapter), events.put
        )
        return events

    def close(self) -> None:
        self.engine.stop()
        self.registry.close()


def answer(events: "queue.Queue[Event]") -> tuple[str, Finished | Failed]:
    text = ""
    while isinstance(event := events.get(timeout=60), Delta):
        text += event.text
    return text, event


def text_of(runner: Runner, tokens: list[int]) -> str:
    return runner.base.tokenizer.decode(tokens, skip_special_tokens=True)


def collect(events: "queue.Queue[Event]") -> str:
    text, ending = answer(events)
    assert isinstance(ending, Finished), ending
    return text


def failure(events: "queue.Queue[Event]") -> str:
    ending = answer(events)[1]
    assert isinstance(ending, Failed)
    return ending.message


def largest(runner: Runner, paths: dict[str, Path]) -> int:
    registry = AdapterRegistry(runner)
    return max(registry.register(n, p).content.size for n, p in paths.items() if n != "base")
