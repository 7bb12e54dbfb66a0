"""The requests of the scenarios, and the answers' parsing."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from load_client import Response, parse
from peers import LlamaCpp, connect_peer, find_llama_server, find_vllm
from safetensors.torch import load_file
from scenarios import ZIPF_CLIENTS, ZIPF_REQUESTS, longest_wait, zipf_draws, zipf_plan
from serve import _parser, _plan
from systems import find_binaries
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM
from workload import BenchmarkError, Job, adapter_names, write_many_adapters


class OneWord:
    """Stands for prompts where no tokenizer is needed."""

    def make(self, tokens: int = 0) -> str:
        return "word"


def test_zipf_draws_follow_one_over_rank() -> None:
    counts = Counter(zipf_draws(Random(0), 1000, 100_000))
    harmonic = sum(1 / rank for rank in range(1, 1001))
    for number in (0, 1, 4, 19):
        expected = 100_000 / harmonic / (number + 1)
        assert counts[number] == pytest.approx(expected, rel=0.1)
    assert 0 <= min(counts) <= max(counts) < 1000


def test_a_plan_has_all_requests_once_and_is_the_same_for_both_servers() -> None:
    plan = zipf_plan(OneWord(), Random("zipf 1"))
    assert plan == zipf_plan(OneWord(), Random("zipf 1"))
    assert plan != zipf_plan(OneWord(), Random("zipf 2"))
    assert [len(jobs) for jobs in plan] == [ZIPF_REQUESTS] * ZIPF_CLIENTS
    delays = [jobs[0].delay for jobs in plan]
    assert delays == sorted(set(delays))
    assert all(job.delay == 0 for jobs in plan for job in jobs[1:])


def test_a_wait_is_counted_in_fair_shares() -> None:
    assert longest_wait([0.5, 3.0, 1.0], [0.5, 1.0, 1.5]) == 3.0


def test_many_adapters_differ_in_weights_only(tmp_path: Path) -> None:
    folder, model = tmp_path / "many", AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    write_many_adapters(model, folder, count=3, rank=2)
    first, *others = (load_file(folder / f"adapter-{n}" / "adapter_model.safetensors")
                      for n in range(3))  # fmt: skip
    for other in others:
        assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in first.items()}
        assert all(not first[name].equal(other[name]) for name in first)
    assert not all(others[0][name].equal(others[1][name]) for name in first)
    changed = (folder / "adapter-1").stat().st_mtime_ns
    write_many_adapters(model, folder, count=3, rank=2)
    assert (folder / "adapter-1").stat().st_mtime_ns == changed


def response(*payloads: dict | str, asked: int = 2) -> Response:
    lines = [p if isinstance(p, str) else json.dumps(p) for p in payloads]
    reads = [(float(at), f"data: {line}\n\n".encode()) for at, line in enumerate(lines, 1)]
    return Response(asked=asked, sent=0.5, status=200, reads=reads)


def piece(text: str | None) -> dict:
    return {"choices": [{"delta": {"content": text}}]}


def test_only_text_counts_as_a_token_that_arrived() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 2}}
    answer = parse(response(piece(None), piece("a"), piece("b"), usage, "[DONE]"))
    assert answer.times == [2.0, 3.0]
    assert (answer.sent, answer.ended, answer.tokens) == (0.5, 5.0, 2)


def test_an_event_that_comes_in_two_reads_arrives_with_its_end() -> None:
    whole = response(piece("a"), {"choices": [], "usage": {"completion_tokens": 2}})
    data = whole.reads[0][1]
    whole.reads[:1] = [(0.7, data[:9]), (0.9, data[9:])]
    assert parse(whole).times == [0.9]


def test_a_short_answer_and_an_error_end_the_run() -> None:
    short = response(piece("a"), {"choices": [], "usage": {"completion_tokens": 1}})
    with pytest.raises(BenchmarkError, match="1 tokens came where 2 were asked for"):
        parse(short)
    with pytest.raises(BenchmarkError, match="no room"):
        parse(response({"error": {"message": "no room"}}))


@pytest.mark.parametrize("pair", ["http://127.0.0.1:1", "x=127.0.0.1:1", "="])
def test_a_peer_is_a_name_and_a_url(pair: str) -> None:
    with pytest.raises(BenchmarkError, match="expected NAME=URL"):
        connect_peer(pair)


def test_a_named_binary_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="--llama-server"):
        find_llama_server(tmp_path / "none")
    with pytest.raises(BenchmarkError, match="--vllm"):
        find_vllm(tmp_path)
    both = SimpleNamespace(llama_server=tmp_path, vllm=None, skip=["llama.cpp"])
    with pytest.raises(BenchmarkError, match="both named and skipped"):
        find_binaries(both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "base-1", "base-9"], r"no case is called base-9; .*zipf-1000"),
        (["--rounds", "0"], "at least 1"),
        (["--only-adapters"], "needs --adapters"),
    ],
)
def test_a_mistake_is_known_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        _plan(_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("adapter", "lora"),
    [(None, [{"id": 0, "scale": 0.0}]), ("adapter-3", [{"id": 3, "scale": 1.0}])],
)
def test_llama_cpp_never_gets_an_empty_list_of_adapters(
    adapter: str | None, lora: list[dict[str, float]]
) -> None:
    """It would apply all of them: the base would be slow, and another model."""
    system = LlamaCpp("llama.cpp", "http://127.0.0.1:1/v1", "base", adapter_names(8))
    assert system.body(Job("word", adapter, 1))["lora"] == lora
