"""submit → events → exactly one ending, whatever happens in between."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError, EngineStoppedError, RequestError, UnknownAdapterError
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


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("contract")
    base = write_tiny_model(folder / "base")
    return {
        "base": base,
        "one": write_random_adapter(folder / "one", base, seed=1),
        "two": write_random_adapter(folder / "two", base, seed=2),
    }


@pytest.fixture(scope="module")
def runner(paths) -> Runner:
    return Runner(load_base(str(paths["base"]), dtype="float32"))


@pytest.fixture
def engine(runner) -> Iterator[Engine]:
    engine = Engine(runner, Limits(4, 4000, 64, 400))
    engine.start()
    yield engine
    engine.stop()


class Inbox:
    """Collects one request's events and notices anything after its ending."""

    def __init__(self) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.endings = 0

    def __call__(self, event: Event) -> None:
        assert self.endings == 0, "an event after the ending"
        self.endings += not isinstance(event, Delta)
        self._events.put(event)

    def next(self) -> Event:
        return self._events.get(timeout=60)

    def ending(self) -> tuple[str, Finished | Failed]:
        text = ""
        while isinstance(event := self.next(), Delta):
            text += event.text
        return text, event


def _submit(engine: Engine, name: str, adapter=None, prompt=PROMPT, **settings) -> Inbox:
    inbox = Inbox()
    sampling = Sampling(**({"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | settings))
    engine.submit(GenerationRequest(name, tuple(prompt), sampling, adapter), inbox)
    return inbox


def test_abort_ends_once_and_gives_the_place_back(engine) -> None:
    running = [_submit(engine, f"r{n}", max_tokens=300) for n in range(4)]
    waiting = _submit(engine, "waiting", max_tokens=300)
    assert isinstance(running[0].next(), Delta)
    for name in ("r0", "waiting", "waiting", "never-there"):
        engine.abort(name)
    assert running[0].ending()[1].reason == "abort"
    assert waiting.ending()[1].reason == "abort"
    for inbox in running[1:]:
        assert inbox.ending()[1].reason == "length"
    # Ids can be used again, and nothing is left behind.
    assert _submit(engine, "r0").ending()[1].reason == "length"
    assert engine.scheduler.blocks.used == 0


def test_what_can_never_run_is_refused_with_the_numbers(engine) -> None:
    with pytest.raises(RequestError, match="make 420; this server takes at most 400"):
        _submit(engine, "long", max_tokens=400)
    with pytest.raises(RequestError, match="prompt is empty"):
        _submit(engine, "empty", prompt=())
    first = _submit(engine, "same", max_tokens=300)
    with pytest.raises(RequestError, match="'same' is in use"):
        _submit(engine, "same")
    engine.abort("same")
    first.ending()


def test_stop_text_and_end_token_say_stop_and_stay_out(engine, runner) -> None:
    text, ending = _submit(engine, "whole", max_tokens=40).ending()
    assert ending.reason == "length"
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    short, ending = _submit(engine, "cut", max_tokens=40, stop=(middle,)).ending()
    assert ending.reason == "stop"
    assert short == text[: text.index(middle)]


def test_a_fault_in_a_step_fails_its_requests_once_and_the_engine_goes_on(
    engine, runner, monkeypatch
) -> None:
    whole, _ = _submit(engine, "before").ending()
    real = runner.run
    broke = threading.Event()

    def breaks_once(step):
        if not broke.is_set():
            broke.set()
            raise RuntimeError("out of memory")
        return real(step)

    monkeypatch.setattr(runner, "run", breaks_once)
    _, ending = _submit(engine, "hit").ending()
    assert isinstance(ending, Failed)
    assert "out of memory" in ending.message
    assert _submit(engine, "after").ending()[0] == whole
    assert engine.is_alive


def test_a_row_with_nan_fails_alone(engine, runner, paths) -> None:
    registry = AdapterRegistry(runner)
    good = registry.load("good", paths["one"])
    bad = registry.load("bad", paths["two"])
    for pair in bad.residents[0].resident.pairs:
        if pair is not None:
            (pair.b_t if pair.blocks is None else pair.blocks)[0, 0] = float("nan")
    expected = _submit(engine, "alone", good).ending()[0]
    inboxes = [_submit(engine, f"m{n}", a) for n, a in enumerate([good, bad, None, good])]
    endings = [inbox.ending() for inbox in inboxes]
    assert isinstance(endings[1][1], Failed)
    assert "not finite" in endings[1][1].message
    assert endings[0][0] == endings[3][0] == expected
    assert isinstance(endings[2][1], Finished)


def test_replacing_a_name_never_changes_a_running_answer(engine, runner, paths) -> None:
    registry = AdapterRegistry(runner)
    first = registry.load("name", paths["one"])
    before = _submit(engine, "quiet", registry.resolve("name"), max_tokens=60).ending()[0]
    running = _submit(engine, "running", registry.resolve("name"), max_tokens=60)
    head = running.next()
    assert isinstance(head, Delta)
    second = registry.load("name", paths["two"])
    assert second.identity != first.identity
    replaced = _submit(engine, "new", registry.resolve("name"), max_tokens=60).ending()[0]
    assert head.text + running.ending()[0] == before
    assert replaced != before
    registry.unload("name")
    with pytest.raises(UnknownAdapterError, match="'name'; known here: none"):
        registry.resolve("name")


def test_a_refused_adapter_leaves_the_old_one_in_place(runner, paths, tmp_path) -> None:
    registry = AdapterRegistry(runner)
    first = registry.load("name", paths["one"])
    with pytest.raises(AdapterError, match="no such directory"):
        registry.load("name", tmp_path / "missing")
    assert registry.resolve("name").key == first.key


def test_a_seed_gives_the_same_answer_alone_and_in_company(engine) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 5, "max_tokens": 30}
    alone = _submit(engine, "alone", **settings).ending()[0]
    company = [_submit(engine, f"c{n}", temperature=1.0, max_tokens=50) for n in range(3)]
    assert _submit(engine, "together", **settings).ending()[0] == alone
    assert _submit(engine, "other", **{**settings, "seed": 6}).ending()[0] != alone
    for inbox in company:
        inbox.ending()


def test_stopping_fails_what_runs_and_refuses_what_comes(runner) -> None:
    engine = Engine(runner, Limits(1, 4000, 64, 400))
    engine.start()
    running, waiting = (_submit(engine, name, max_tokens=380) for name in ("a", "b"))
    assert isinstance(running.next(), Delta)
    engine.stop()
    for inbox in (running, waiting):
        ending = inbox.ending()[1]
        assert isinstance(ending, Failed)
        assert "shutting down" in ending.message
    with pytest.raises(EngineStoppedError):
        _submit(engine, "late")
    assert not engine.is_alive


def test_many_threads_many_aborts_each_ends_once(engine) -> None:
    inboxes: list[Inbox] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for turn in range(6):
            length, limit, coin = torch.randint(1, 40, (3,), generator=generator).tolist()
            name = f"{number}-{turn}"
            inbox = _submit(engine, name, prompt=range(5, 5 + length), max_tokens=limit)
            with lock:
                inboxes.append(inbox)
            if coin < 15:
                engine.abort(name)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [inbox.ending()[1].reason for inbox in inboxes]
    assert len(reasons) == 36
    assert set(reasons) <= {"length", "abort"}
    assert all(inbox.endings == 1 for inbox in inboxes)
    assert engine.scheduler.sequences() == []
