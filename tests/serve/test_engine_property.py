"""An answer does not depend on its company: the batch, chunks, shared prefixes, preemption.

Random arrivals, aborts, adapters, lengths and cache sizes; every answer is compared, token for
token, with the one that the request gets alone on an engine that shares nothing.
"""

import queue
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, Event, GenerationRequest, Sampling
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits

ADAPTERS = {
    "plain": {},
    "dora": {"use_dora": True},
    "few": {"target_modules": ["q_proj"], "r": 7},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], "bias": "all"},
}


@dataclass
class World:
    runner: Runner
    requests: list[GenerationRequest]
    answers: list[str]


class Answer:
    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._first: list[Event] = []

    def wait_for_something(self) -> None:
        self._first.append(self.events.get(timeout=60))

    def _next(self) -> Event:
        return self._first.pop(0) if self._first else self.events.get(timeout=60)

    def text_and_ending(self) -> tuple[str, str]:
        text = ""
        while isinstance(event := self._next(), Delta):
            text += event.text
        return text, getattr(event, "reason", str(event))


@pytest.fixture(
    scope="module",
    params=[
        ("llama", "none"),
        ("mistral", "none"),
        ("gemma2", "nf4"),
        pytest.param(("qwen3", "int8"), marks=pytest.mark.slow),
        pytest.param(("gemma3", "none"), marks=pytest.mark.slow),
        pytest.param(("llama-untied", "nf4"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def world(request, tmp_path_factory) -> World:
    """24 requests and their answers: three beginnings, the base and adapters of several kinds."""
    family, quantization = request.param
    folder: Path = tmp_path_factory.mktemp(family)
    base = write_tiny_model(folder / "base", family)
    runner = Runner(load_base(str(base), quantization, dtype="float32"))
    registry = AdapterRegistry(runner)
    adapters = [None] + [
        registry.load(name, write_random_adapter(folder / name, base, seed=seed, **kind))
        for seed, (name, kind) in enumerate(ADAPTERS.items())
    ]
    choices = random.Random(5)
    beginnings = [[choices.randrange(3, 400) for _ in range(70)] for _ in range(3)]
    requests = []
    for number in range(24):
        shared = choices.choice(beginnings)[: choices.randrange(1, 70)]
        own = [choices.randrange(3, 400) for _ in range(choices.randrange(1, 20))]
        is_sampled = number % 3 == 0
        sampling = Sampling(
            max_tokens=choices.randrange(1, 25),
            temperature=1.0 if is_sampled else 0.0,
            seed=number if is_sampled else None,
            ignore_eos=True,
        )
        prompt = (*shared, *own)
        requests.append(
            GenerationRequest(str(number), prompt, sampling, adapters[number % len(adapters)])
        )
    engine = Engine(runner, Limits(1, 200, 200, 150, reuse_prefixes=False))
    engine.start()
    answers = []
    for one in requests:
        answer = Answer()
        engine.submit(one, answer.events.put)
        text, ending = answer.text_and_ending()
        assert ending == "length"
        answers.append(text)
    engine.stop()
    assert len(set(answers)) > 20  # they do differ
    return World(runner, requests, answers)


@settings(
    deadline=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # threads make shrinking pointless
)
@given(
    limits=st.builds(
        Limits,
        max_sequences=st.integers(1, 8),
        cache_tokens=st.integers(144, 600),
        step_tokens=st.integers(3, 120),
        max_length=st.just(140),
    ),
    seed=st.integers(0, 2**32),
)
def test_every_answer_is_the_one_given_alone(world, limits, seed) -> None:
    choices = random.Random(seed)
    engine = Engine(world.runner, limits)
    picked = [choices.randrange(24) for _ in range(20)]
    answers = [Answer() for _ in picked]
    aborted: set[int] = set()
    engine.start()
    try:
        for number, which in enumerate(picked):
            one = replace(
                world.requests[which], request_id=str(number), client=choices.choice("ab"),
                priority=choices.choice([0, 0, 1]),
            )  # fmt: skip
            engine.submit(one, answers[number].events.put)
            if choices.random() < 0.2:
                victim = choices.randrange(number + 1)
                engine.abort(str(victim))
                aborted.add(victim)
            if choices.random() < 0.3:  # the next one comes when this one has got somewhere
                answers[number].wait_for_something()
        for number, which in enumerate(picked):
            text, ending = answers[number].text_and_ending()
            if ending == "abort":
                assert number in aborted
                assert world.answers[which].startswith(text)
            else:
                assert ending == "length"
                assert text == world.answers[which], f"request {number}, a copy of {which}"
    finally:
        engine.stop()
    assert engine.scheduler.blocks.used == 0
    assert engine.scheduler.sequences() == []
