"""SIGKILL at random moments: each name holds its old or its new content, whole.

A forked child works on the store and is killed, either by itself at a random line of the code
that writes (every line is as likely, however short it takes), or by its parent at a random time.
"""

import os
import random
import signal
import sys
import time

import pytest

from qlora_serve import files
from qlora_serve.adapters import sources, store
from qlora_serve.adapters.folder import OBJECTS
from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from tests.bare_adapters import content, write_bare_adapter

_TRACED = {module.__file__ for module in (files, sources, store, sys.modules["shutil"])}


@pytest.fixture
def adapters(tmp_path):
    return [write_bare_adapter(tmp_path / f"source{seed}", seed) for seed in range(2)]


def add(store, name, source, **options):
    store.add(name, find_source(str(source)), str(source), **options)


# Each: the names before, what is done, and every state of names that is right afterwards.
OPERATIONS = {
    "add": (
        {},
        lambda store, a, b: add(store, "one", a),
        [{}, {"one": 0}],
    ),
    "replace": (
        {"one": 0},
        lambda store, a, b: add(store, "one", b, replace=True),
        [{"one": 0}, {"one": 1}],
    ),
    "remove": (
        {"one": 0},
        lambda store, a, b: store.remove("one"),
        [{"one": 0}, {}],
    ),
    "rename": (
        {"one": 0},
        lambda store, a, b: store.rename("one", "two"),
        [{"one": 0}, {"two": 0}],
    ),
    "rename over another": (
        {"one": 0, "two": 1},
        lambda store, a, b: store.rename("one", "two", replace=True),
        [{"one": 0, "two": 1}, {"two": 0}],
    ),
    "replace a plain directory": (
        {"one": "plain"},
        lambda store, a, b: add(store, "one", b, force=True),
        [{"one": 0}, {"one": 1}],
    ),
    "remove a plain directory": (
        {"one": "plain"},
        lambda store, a, b: store.remove("one", force=True),
        [{"one": 0}, {}],
    ),
    "clean": (
        {"one": 0},
        lambda store, a, b: store.clean(0),
        [{"one": 0}],
    ),
}


def prepare(store, adapters, before):
    for name in store.list() if store.folder.is_dir() else ():
        store.remove(name, force=True)
    for name, what in before.items():
        if what == "plain":
            write_bare_adapter(store.folder / name)
        else:
            add(store, name, adapters[what])


def run_child(work, lines_to_live=None):
    """Runs `work` in a fork that kills itself after so many lines; gives its wait status."""
    child = os.fork()
    if child == 0:
        try:
            if lines_to_live is not None:
                trace_until(lines_to_live, lambda: os.kill(os.getpid(), signal.SIGKILL))
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def trace_until(count, act):
    left = count

    def on_line(frame, event, argument):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                act()
        return on_line

    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in _TRACED else None)


def count_lines(work):
    """How many lines `work` runs, counted in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lines = [0]

        def on_line(frame, event, argument):
            lines[0] += event == "line"
            return on_line

        sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in _TRACED else None)
        work()
        sys.settrace(None)
        os.write(writer, str(lines[0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        return int(stream.read())


def seen(store, wholes):
    """Name → which of the adapters it holds; a torn one is in no list and fails."""
    return {name: wholes.index(content(e.path)) for name, e in store.list().items()}


def no_leftovers(store):
    return not [n for n in os.listdir(store.folder / OBJECTS) if n.endswith(".partial")]


def kill_at(store, adapters, operation, moment):
    """Kills an operation at a line, and checks all that must hold; whether it was reached."""
    before, act, allowed = OPERATIONS[operation]
    wholes = [content(folder) for folder in adapters]
    prepare(store, adapters, before)
    status = run_child(lambda: act(store, *adapters), moment)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    assert seen(store, wholes) in allowed
    # The store still works, what is added now is whole, and nothing of the killed one is left.
    for place, adapter in enumerate(adapters):
        add(store, "probe", adapter, replace=True)
        assert content(store.folder / "probe") == wholes[place]
    store.remove("probe")
    assert no_leftovers(store)
    return os.WIFSIGNALED(status)


def lines_of(store, adapters, operation):
    before, act, _ = OPERATIONS[operation]
    prepare(store, adapters, before)
    total = count_lines(lambda: act(store, *adapters))
    assert total > 50
    return total


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_random_lines(tmp_path, adapters, operation):
    store = AdapterStore(tmp_path / "store", grace_seconds=0)
    total = lines_of(store, adapters, operation)
    moments = random.Random(operation)
    kills = [kill_at(store, adapters, operation, moments.randint(1, total)) for _ in range(6)]
    assert any(kills)
    store.clean(0)
    kept = {entry.path.name for entry in store.list().values() if entry.is_managed}
    assert {p.name for p in (store.folder / OBJECTS).iterdir() if p.is_dir()} == kept


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_lines_all_along(tmp_path, adapters, operation):
    """Every fifth, beginning anywhere; every single one has been tried, in ten minutes."""
    store = AdapterStore(tmp_path / "store", grace_seconds=0)
    total = lines_of(store, adapters, operation)
    moments = range(random.randint(1, 5), total + 1, 5)
    kills = [kill_at(store, adapters, operation, moment) for moment in moments]
    assert sum(kills) > 0.8 * len(moments)


def work_for_ever(folder, adapters, seed):
    store, choose = AdapterStore(folder, grace_seconds=0), random.Random(seed)
    while True:
        name = choose.choice(["one", "two"])
        if choose.random() < 0.6:
            add(store, name, choose.choice(adapters), replace=True)
        elif name in store.list():
            store.remove(name)


@pytest.mark.slow
def test_killed_200_times_at_random_times(tmp_path, adapters):
    wholes = [content(folder) for folder in adapters]
    store = AdapterStore(tmp_path / "store", grace_seconds=0)
    add(store, "still", adapters[0])
    moments = random.Random(7)
    states = set()
    for seed in range(200):
        child = os.fork()
        if child == 0:
            try:
                work_for_ever(store.folder, adapters, seed)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL  # and no error before
        state = seen(store, wholes)
        assert state.pop("still") == 0
        states.add(tuple(sorted(state.items())))
        for place, adapter in enumerate(adapters):
            add(store, "probe", adapter, replace=True)
            assert content(store.folder / "probe") == wholes[place]
        store.remove("probe")
        assert no_leftovers(store)
    assert len(states) == 9, "the killed processes got nowhere"  # absent, 0 or 1 for two names
    store.clean(0)
    kept = {entry.path.name for entry in store.list().values()}
    assert {p.name for p in (store.folder / OBJECTS).iterdir() if p.is_dir()} == kept
