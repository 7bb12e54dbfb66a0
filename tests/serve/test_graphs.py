"""Decoding from fixed buffers, as CUDA graphs need it; a replay calls the function again."""

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_batch import check_against_peft, load_residents, mixed_rows
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine import graphs as module
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.flash_reference import REFERENCE
from qlora_serve.serve.engine.graphs import GraphSlots, bucket
from qlora_serve.serve.engine.lora import ResidentAdapter
from qlora_serve.serve.engine.pairs import ResidentPair
from qlora_serve.serve.engine.request import Delta, GenerationRequest, Sampling
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 4},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 16}},
    "few": {"target_modules": ["q_proj"]},
    "output": {"target_modules": ["lm_head", "v_proj"]},
}


class Captures:
    """In the place of CUDA: keeps each function, and calls it for a replay."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.count += 1
        return function


def _runner(base: Path) -> tuple[Runner, Captures]:
    captures = Captures()
    loaded = load_base(str(base), dtype="float32")
    return Runner(loaded, flash=REFERENCE, capture=captures), captures


def _adapters(folder: Path, base: Path, kinds: dict[str, dict]) -> dict[str, Path]:
    return {
        name: write_random_adapter(folder / name, base, seed=seed, **settings)
        for seed, (name, settings) in enumerate(kinds.items())
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["llama-untied", "gemma2"])
@torch.inference_mode()
def test_a_mixed_batch_matches_peft(family: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", family)
    kinds = {n: s for n, s in KINDS.items() if n != "output" or family == "llama-untied"}
    paths = _adapters(tmp_path, base, kinds)
    runner, captures = _runner(base)
    lengths = {"base": 300} | {name: 6 + 60 * number for number, name in enumerate(paths)}
    found = mixed_rows(runner, load_residents(runner, paths), lengths)
    assert runner.graphs is not None
    assert (runner.graphs.replays, captures.count) == (4, 1)  # every step of decoding, one graph
    check_against_peft(base, paths, found, 1e-4, differs_by=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"r": module.RANK + 1},
        {"bias": "all"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ],
    ids=str,
)
@torch.inference_mode()
def test_what_does_not_fit_is_run_without_a_graph(kind: dict, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    paths = _adapters(tmp_path, base, {"plain": {}, "other": kind})
    runner, captures = _runner(base)
    found = mixed_rows(runner, load_residents(runner, paths), {"base": 9, "plain": 9, "other": 9})
    assert captures.count == 0
    check_against_peft(base, paths, found, 1e-4, differs_by=0.1)


def test_answers_are_those_without_graphs(tmp_path: Path, monkeypatch) -> None:
    """Requests come and go, so that the number of rows and who is in them changes all the time."""
    monkeypatch.setattr(module, "SLOTS", 2)  # fewer than adapters
    base = write_tiny_model(tmp_path / "base", "mistral")
    kinds = {name: KINDS[name] for name in ("plain", "rslora", "few")}
    paths = _adapters(tmp_path, base, kinds)

    def answers(runner: Runner, limits: Limits) -> list[str]:
        residents = [None, *load_residents(runner, paths).values()]
        engine = Engine(runner, limits)
        engine.start()
        events: list[queue.Queue] = []
        try:
            for number in range(14):
                prompt = tuple(range(20 + number, 40 + 9 * number))
                sampling = Sampling(
                    max_tokens=3 + 5 * number % 17,
                    temperature=float(number % 2),
                    seed=number,
                    ignore_eos=True,
                )
                adapter = residents[number % len(residents)]
                events.append(queue.Queue())
                request = GenerationRequest(str(number), prompt, sampling, adapter)
                engine.submit(request, events[-1].put)
            texts = []
            for one in events:
                texts.append("")
                while isinstance(event := one.get(timeout=60), Delta):
                    texts[-1] += event.text
        finally:
            engine.stop()
        return texts

    plain = answers(Runner(load_base(str(base), dtype="float32")), Limits(6, 2048, 64, 300))
    runner, captures = _runner(base)
    assert answers(runner, Limits(6, 4096, 64, 300)) == plain
    assert runner.graphs is not None
    assert runner.graphs.replays > 10
    assert captures.count <= 4  # for 1, 2, 4 and 6 rows


def test_buckets() -> None:
    assert [bucket(rows, 32) for rows in (1, 2, 3, 5, 16, 17, 32)] == [1, 2, 4, 8, 16, 32, 32]
    assert bucket(5, 6) == 6


@torch.inference_mode()
def test_slots_keep_who_is_needed_and_leave_nothing_behind(monkeypatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 2)
    torch.manual_seed(0)

    def adapter(name: str, rank: int) -> ResidentAdapter:
        pair = ResidentPair(torch.randn(rank, 5), torch.randn(rank, 7))
        return ResidentAdapter(name, name, (pair,), 0)

    wide, narrow, third = adapter("wide", 16), adapter("narrow", 1), adapter("third", 4)
    slots = GraphSlots([(5, 7)], 4, torch.float32, torch.device("cpu"))
    hidden = torch.randn(1, 4, 5)

    def check(*rows: ResidentAdapter | None) -> None:
        placed = slots.place(rows)
        assert placed is not None
        slots.rows.copy_(torch.tensor(placed))
        slots.scales.copy_(torch.tensor([[2.0], [1.0], [-0.5], [1.0]]))
        found = slots.add(0, hidden, torch.ones(1, 4, 7))
        expected = torch.ones(4, 7)
        for number, one in enumerate(rows):
            if one is not None:
                pair, scale = one.pairs[0], float(slots.scales[number])
                assert pair is not None
                row = expected[number : number + 1]
                pair.update(row, hidden[0, number : number + 1], scale)
        assert (found[0] - expected).abs().max() < 1e-5

    check(wide, None, narrow, wide)
    check(third, None, third, wide)  # in the place of the narrow one
    check(narrow, narrow, None, third)  # rank 1 where rank 16 was
    assert slots.place([wide, narrow, third, None]) is None
