"""A running server and the store's commands, each a process of its own: names change under it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import httpx
import pytest
import torch
from peft import PeftModel
from server_process import running_server
from tiny_models import write_random_adapter, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The quick brown fox"
LONG = 1200
ASKERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("live") / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_random_adapter(folder / f"a{seed}", base, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def expected(base, adapters) -> list[str]:
    """What each adapter says alone, in PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    texts = []
    for adapter in adapters:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, adapter).eval()
        ids = model.generate(**prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        texts.append(
            tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    assert texts[0] != texts[1]
    return texts


def adapters_command(store: Path, *arguments: str | Path) -> dict:
    call = [sys.executable, "-m", "qlora_serve.cli", "adapters", *map(str, arguments)]
    done = subprocess.run(
        [*call, "--adapters-dir", str(store), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def body(name: str, tokens: int) -> dict:
    settings = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return {"model": name, "prompt": PROMPT} | settings


def ask(url: str, name: str, tokens: int = 30) -> str | None:
    """The answer under a name; None where there is no such name."""
    answer = httpx.post(f"{url}/v1/completions", json=body(name, tokens), timeout=120)
    if answer.status_code == 404:
        return None
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return answer.json()["choices"][0]["text"]


@dataclass
class Asked:
    """A long answer, and when it began and ended."""

    begun: float
    ended: float
    text: str | None


@contextmanager
def always_asked(url: str, name: str) -> Iterator[Callable[[], list[Asked]]]:
    """Long answers one after the other; gives what ends them and tells all.

    Each asker's first answer has another length, so that they do not all begin and end at once: at
    any moment some are well on their way.
    """
    end = Event()

    def work(first: int) -> list[Asked]:
        ask(url, name, first)
        asked = []
        while not end.is_set():
            begun = time.monotonic()
            text = ask(url, name, LONG)
            asked.append(Asked(begun, time.monotonic(), text))
        return asked

    with ThreadPoolExecutor(ASKERS) as pool:
        workers = [pool.submit(work, 1 + LONG * asker // ASKERS) for asker in range(ASKERS)]

        def told() -> list[Asked]:
            end.set()
            return [asked for worker in workers for asked in worker.result()]

        try:
            yield told
        finally:
            end.set()


def seen(what: str, before: Callable[[], bool], after: Callable[[], bool]) -> tuple[float, float]:
    """Waits for a change; gives a moment before it and one after it."""
    deadline = time.monotonic() + 60
    last = time.monotonic()
    while not after():
        now = time.monotonic()
        assert now < deadline, f"not within a minute: {what}"
        if before():
            last = now
    return last, time.monotonic()


def test_each_change_is_seen_and_running_requests_keep_their_weights(
    base, adapters, expected, tmp_path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    options = ["--adapters-dir", store, "--adapters-poll", "0.1", "--dtype", "float32"]
    with running_server(base, *options) as url:

        def answers(name: str, text: str | None) -> Callable[[], bool]:
            return lambda: ask(url, name) == text

        assert ask(url, "mine") is None
        adapters_command(store, "add", "mine", adapters[0])
        seen("added", answers("mine", None), answers("mine", expected[0]))
        first = ask(url, "mine", LONG)

        with always_asked(url, "mine") as told:
            adapters_command(store, "add", "mine", adapters[1], "--replace")
            last, new = seen("replaced", answers("mine", expected[0]), answers("mine", expected[1]))
            asked = told()
        second = ask(url, "mine", LONG)
        assert second != first
        # Whole answers of the one or of the other, and some that ran on while the name changed.
        assert {a.text for a in asked} <= {first, second}
        assert [a.text for a in asked if a.begun < last and a.ended > new].count(first) > 0

        for command, gone, left in (("rename", "mine", "yours"), ("remove", "yours", None)):
            with always_asked(url, gone) as told:
                adapters_command(store, command, gone, *([left] if left else []))
                last, new = seen(command, answers(gone, expected[1]), answers(gone, None))
                if left is not None:
                    seen(command, answers(left, None), answers(left, expected[1]))
                asked = told()
            assert {a.text for a in asked} <= {second, None}
            assert [a.text for a in asked if a.begun < last and a.ended > new].count(second) > 0
        names = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
        assert names.isdisjoint({"mine", "yours"})
