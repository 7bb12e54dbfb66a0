"""How much an adapter changed each token's distribution, against PEFT and plain log-softmax."""

import itertools
import queue
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixed_batch import reference
from tiny_models import CONFIGS, write_random_adapter, write_tiny_model

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.load import load_base
from qlora_serve.errors import RequestError
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.request import (
    Delta,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Score,
    Sequence,
)
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import SCORED_TOKENS, Chunk, Limits, Scheduler, scorable

ADAPTERS = {
    "plain": {},
    "head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
}
TOLERANCE = 1e-4  # nats, float32


@pytest.fixture(scope="module", params=["gemma2", "llama-untied", "phi", "qwen3"])
def family(request, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    base = write_tiny_model(folder / "base", request.param)
    has_head = not CONFIGS[request.param]().tie_word_embeddings and request.param != "phi"
    paths = {
        name: write_random_adapter(folder / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(ADAPTERS.items())
        if name != "head" or has_head
    }
    return base, paths


@torch.inference_mode()
def _expected(base: Path, adapter: Path, prompt: tuple, answer: tuple):
    tokens = torch.tensor([[*prompt, *answer]])
    found = [
        reference(base, path)(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        for path in (adapter, None)
    ]
    targets = torch.tensor(answer)[:, None]
    divergences = torch.nn.functional.kl_div(found[1], found[0], reduction="none", log_target=True)
    own, plain = (one.gather(1, targets)[:, 0] for one in found)
    return own, plain, divergences.sum(-1)


def _random(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 400, (count,), generator=generator).tolist())


class _Inbox:
    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()

    def ending(self):
        while isinstance(event := self.events.get(timeout=60), Delta):
            pass
        return event


def _score(engine, name, prompt, answer, adapter=None, against=None) -> tuple[Score, _Inbox]:
    inbox = _Inbox()
    score = Score(len(prompt) - 1, answer, against)
    request = GenerationRequest(
        name, (*prompt, *answer[:-1]), Sampling(max_tokens=1), adapter, score=score
    )
    engine.submit(request, inbox.events.put)
    return score, inbox


def _take_places(scheduler: Scheduler) -> None:
    """From now on, whoever came last loses its place in every fifth step."""
    schedule, calls = scheduler.schedule, itertools.count(1)

    def interrupted():
        if next(calls) % 5 == 0 and scheduler.running:
            scheduler.preempt(scheduler.sequences()[scheduler.running - 1])
        return schedule()

    scheduler.schedule = interrupted


@pytest.mark.parametrize("preempts", [False, True], ids=["undisturbed", "preempted"])
def test_divergence_and_logprobs_are_those_of_the_full_models(family, preempts) -> None:
    """Scoring runs among other requests, in small chunks, and may lose its place."""
    base, paths = family
    runner = Runner(load_base(str(base), dtype="float32"))
    fit = FitChecker(runner.base.source)
    engine = Engine(runner, Limits(4, 4000, 48, 400))
    if preempts:
        _take_places(engine.scheduler)
    engine.start()
    residents = {
        name: runner.resident(name, load_weights(read_adapter(path), fit))
        for name, path in paths.items()
    }
    others = []
    for number in range(4):
        inbox = _Inbox()
        settings = Sampling(max_tokens=60, temperature=0.0, ignore_eos=True)
        engine.submit(
            GenerationRequest(f"other{number}", _random(40, number), settings), inbox.events.put
        )
        others.append(inbox)
    # Longer than a step's share of scored tokens, and than the window of the windowed family.
    texts = {name: (_random(37, 50 + n), _random(90, 90 + n)) for n, name in enumerate(paths)}
    texts["plain"] = (_random(20, 7), _random(1, 8))
    firsts = {name: _score(engine, f"{name}-base", *text) for name, text in texts.items()}
    for _, inbox in firsts.values():
        ending = inbox.ending()
        assert isinstance(ending, Finished)
        assert ending.reason == "scored"
        assert ending.usage.completion_tokens == 0
    seconds = {
        name: _score(engine, name, *text, residents[name], firsts[name][0])
        for name, text in texts.items()
    }
    for name, (score, inbox) in seconds.items():
        assert isinstance(inbox.ending(), Finished)
        own, plain, divergences = _expected(base, paths[name], *texts[name])
        for values, expected in (
            (score.logprobs, own),
            (score.base_logprobs, plain),
            (score.divergences, divergences),
        ):
            assert len(values) == len(texts[name][1])
            error = (torch.tensor(values, dtype=torch.float64) - expected).abs().max()
            assert error < TOLERANCE, f"{name}: {error}"
        assert divergences.max() > 0.01, "the adapter must change something"
    for inbox in others:
        ending = inbox.ending()
        assert isinstance(ending, Finished)
        assert ending.usage.completion_tokens == 60
    assert (engine.scheduler.preemptions > 0) == preempts
    assert engine.scheduler.blocks.used == 0
    engine.stop()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Runner]:
    folder = tmp_path_factory.mktemp("scoring")
    base = write_tiny_model(folder / "base")
    return base, Runner(load_base(str(base), dtype="float32"))


def test_the_base_against_itself_does_not_diverge_even_when_its_prompt_is_cached(llama) -> None:
    _, runner = llama
    engine = Engine(runner, Limits(4, 4000, 64, 400))
    engine.start()
    prompt, answer = _random(64, 1), _random(40, 2)
    for name in ("once", "again"):
        first, inbox = _score(engine, f"{name}-1", prompt, answer)
        assert isinstance(inbox.ending(), Finished)
        second, inbox = _score(engine, f"{name}-2", prompt, answer, None, first)
        ending = inbox.ending()
        assert ending.usage.cached_tokens >= 48
        assert second.logprobs == pytest.approx(second.base_logprobs, abs=1e-5)
        assert max(second.divergences) < 1e-6
    engine.stop()


def test_an_adapter_that_diverged_to_nan_fails_alone(llama, tmp_path) -> None:
    base, runner = llama
    fit = FitChecker(runner.base.source)
    path = write_random_adapter(tmp_path / "one", base)
    resident = runner.resident("one", load_weights(read_adapter(path), fit))
    engine = Engine(runner, Limits(4, 4000, 64, 400))
    engine.start()
    prompt, answer = _random(20, 1), _random(10, 2)
    first, inbox = _score(engine, "first", prompt, answer)
    assert isinstance(inbox.ending(), Finished)
    bad = Score(first.first, first.targets, hidden=first.hidden * float("nan"))
    _, broken = _score(engine, "broken", prompt, answer, resident, bad)
    _, whole = _score(engine, "whole", prompt, answer, resident, first)
    ending = broken.ending()
    assert isinstance(ending, Failed)
    assert "not finite" in ending.message
    assert isinstance(whole.ending(), Finished)
    engine.stop()


def test_different_vocabularies_are_refused(llama, tmp_path) -> None:
    base, runner = llama
    fit = FitChecker(runner.base.source)
    path = write_random_adapter(
        tmp_path / "more", base, vocabulary=520, target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    resident = runner.resident("more", load_weights(read_adapter(path), fit))
    engine = Engine(runner, Limits(4, 4000, 64, 400))
    first = Score(3, (1, 2))
    with pytest.raises(RequestError, match="520 tokens and the base 512"):
        _score(engine, "x", (1, 2, 3, 4), (5, 6), replace_selection(resident, 520), first)


def replace_selection(resident, vocabulary):
    """A selection's face: what the engine asks of one."""
    return type("Selected", (), {"vocabulary": vocabulary, "key": resident.key})()


def _scored(prompt: int, answer: int, computed: int) -> Sequence:
    request = GenerationRequest(
        "r", tuple(range(prompt + answer - 1)), Sampling(1),
        score=Score(prompt - 1, tuple(range(answer)), Score(0, ())),
    )  # fmt: skip
    return Sequence(request, lambda event: None, computed=computed)


@pytest.mark.parametrize(
    ("sequences", "room", "needs"),
    [
        ([_scored(10, 100, 0)], 64, [9 + 64]),
        ([_scored(10, 100, 50)], 64, [59]),
        ([_scored(10, 50, 0), _scored(10, 50, 0)], 64, [59, 9 + 14]),
        ([_scored(10, 100, 20), _scored(10, 50, 30)], 64, [64, 0]),
        ([replace(_scored(10, 2, 0), request=GenerationRequest("g", (1,) * 99, Sampling(1)))],
         5, [99]),
    ],
)  # fmt: skip
def test_a_step_scores_only_so_much(sequences, room, needs) -> None:
    assert scorable(sequences, room) == needs


def test_every_position_is_scored_once_in_bounded_steps() -> None:
    scheduler = Scheduler(Limits(4, 8000, 256, 1000))
    sequences = [_scored(30, 300, 0), _scored(7, 100, 0), _scored(400, 1, 0)]
    for sequence in sequences:
        scheduler.add(sequence)
    seen: dict[int, list[int]] = {id(sequence): [] for sequence in sequences}
    while step := scheduler.schedule().chunks:
        assert sum(chunk.outputs for chunk in step) <= SCORED_TOKENS + len(step)
        for chunk in step:
            end = chunk.start + chunk.count
            seen[id(chunk.sequence)] += range(end - chunk.scored, end)
            assert not chunk.samples
            scheduler.record(chunk)
            if chunk.completes:
                scheduler.remove(chunk.sequence)
    for sequence in sequences:
        score = sequence.request.score
        assert seen[id(sequence)] == [score.first + n for n in range(len(score.targets))]


def test_a_chunk_before_the_answer_scores_nothing() -> None:
    sequence = _scored(30, 5, 0)
    assert Chunk(sequence, 0, 29).scored == 0
    assert Chunk(sequence, 0, 30).scored == 1
