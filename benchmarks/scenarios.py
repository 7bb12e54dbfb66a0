"""What tokens per second do not show: many adapters, long prompts, starting, memory.

Each scenario runs by itself, with servers of its own, when the peers have been stopped.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from results import Outcome, milliseconds, percentile
from servers import OWN_NAME, HttpSystem, adapter_options, own_server, resident_bytes
from workload import (
    OUTPUT_TOKENS,
    WARM_UP_TOKENS,
    BenchmarkError,
    Job,
    Measurement,
    Prompts,
    adapter_names,
    write_adapters,
    write_many_adapters,
)

from qlora_serve.adapters.files import WEIGHTS_FILE
from qlora_serve.progress import console as status

ZIPF_ADAPTERS = 1000
ZIPF_RANK = 4
ZIPF_SLOTS = 16
ZIPF_CLIENTS = 16
ZIPF_REQUESTS = 3
"""Of each client in a round."""
_STAGGER_SECONDS = 0.25
"""Between the clients' first requests: a burst would make waits that are nobody's fault."""

LONG_PROMPT = 4000
_LONG_PROMPT_LEAD = 0.3
"""Seconds by which the long prompt is ahead of the short one."""
_REPEATS = 3
"""Of what takes seconds, in each round."""

_CACHE = "256MB"
_CACHE_BYTES = 256_000_000
MEMORY_ADAPTERS = 8
_CYCLED_ADAPTERS = 4
CYCLES = 2000
QUICK_CYCLES = 200

_PLAIN_LOADING = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print("loaded", flush=True)
"""


@dataclass(frozen=True)
class Setting:
    """What the scenarios work with."""

    base: str
    """The base's directory."""
    weights: int
    """Its bytes in float32."""
    tokenizer: Any
    adapters: Path
    """The folder of the adapters; each scenario that needs others writes them below it."""
    logs: Path
    salt: str
    """Makes this run's prompts its own."""
    options: Sequence[str]
    """More of our server's command line."""
    rounds: int
    quick: bool

    def prompts(self, name: str) -> Prompts:
        """Prompts that no other turn uses."""
        return Prompts(self.tokenizer, f"{self.salt} {name}")


@dataclass(frozen=True)
class Scenario:
    """A case that is more than one turn of tokens per second."""

    name: str
    meaning: str
    run: Callable[[Setting], Outcome]
    prepare: Callable[[Any, Path], None] = lambda model, adapters: None
    """Writes the adapters that it needs, once; takes the base's model and the folder."""


# --- 1,000 adapters, few slots


def zipf(setting: Setting) -> Outcome:
    """Requests by popularity, with slots for few adapters and with room for all."""
    folder = _zipf_folder(setting.adapters)
    size = (folder / "adapter-0" / WEIGHTS_FILE).stat().st_size
    names = adapter_names(ZIPF_ADAPTERS)
    serve = ["--adapters-dir", str(folder), "--adapters-poll", "0", *setting.options]

    def server(memory: int, name: str) -> Any:
        return own_server(
            setting.base, setting.logs, [*serve, "--adapter-memory", str(memory)], names, name
        )

    # Half an adapter more, so that rounding up does not take a slot away.
    few_bytes = size * ZIPF_SLOTS + size // 2
    with (
        server(size * (ZIPF_ADAPTERS + 1), f"{OWN_NAME}, all resident") as resident,
        server(few_bytes, f"{OWN_NAME}, {ZIPF_SLOTS} slots") as few,
    ):
        turns: list[tuple[Measurement, Measurement]] = []
        for turn in range(setting.rounds + 1):
            plan = zipf_plan(setting.prompts(f"zipf {turn}"), Random(f"zipf {turn}"))
            if turn == 0:
                for system in (resident, few):
                    system.run([[replace(jobs[0], max_tokens=WARM_UP_TOKENS)] for jobs in plan])
                continue
            order = (few, resident) if turn % 2 else (resident, few)
            measured = {system.name: system.run(plan) for system in order}
            turns.append((measured[few.name], measured[resident.name]))
    return _zipf_outcome(turns)


def _zipf_folder(adapters: Path) -> Path:
    return adapters / f"zipf-{ZIPF_ADAPTERS}-rank-{ZIPF_RANK}"


def _write_zipf(model: Any, adapters: Path) -> None:
    write_many_adapters(model, _zipf_folder(adapters), ZIPF_ADAPTERS, ZIPF_RANK)


def zipf_draws(random: Random, population: int, count: int) -> list[int]:
    """Draws `count` numbers below `population`; number k comes 1 / (k + 1) times as often as 0."""
    weights = [1 / (number + 1) for number in range(population)]
    return random.choices(range(population), weights, k=count)


def zipf_plan(prompts: Prompts, random: Random) -> list[list[Job]]:
    """The requests of a round, a list for each client, which come one after another."""
    # Popularity has nothing to do with the order in which adapters are found at start.
    by_popularity = adapter_names(ZIPF_ADAPTERS)
    Random("popularity").shuffle(by_popularity)
    draws = zipf_draws(random, ZIPF_ADAPTERS, ZIPF_CLIENTS * ZIPF_REQUESTS)
    jobs = [Job(prompts.make(), by_popularity[number], OUTPUT_TOKENS) for number in draws]
    clients = [jobs[client::ZIPF_CLIENTS] for client in range(ZIPF_CLIENTS)]
    return [
        [replace(own[0], delay=client * _STAGGER_SECONDS), *own[1:]]
        for client, own in enumerate(clients)
    ]


def longest_wait(few: Sequence[float], resident: Sequence[float]) -> float:
    """The longest wait, in fair shares.

    A request's fair share is what it waits for its first token because the others are there: the
    mean over the same requests, sent in the same way, where no adapter ever waits for a slot.
    """
    return max(few) / mean(resident)


def _zipf_outcome(turns: list[tuple[Measurement, Measurement]]) -> Outcome:
    few, resident = ([pair[side] for pair in turns] for side in (0, 1))
    waits = {
        "slots": [value for turn in few for value in turn.ttfts],
        "resident": [value for turn in resident for value in turn.ttfts],
    }
    figures = {
        "adapters": ZIPF_ADAPTERS,
        "rank": ZIPF_RANK,
        "slots": ZIPF_SLOTS,
        "clients": ZIPF_CLIENTS,
        "requests_a_round": ZIPF_CLIENTS * ZIPF_REQUESTS,
        "tokens_per_second": {
            "slots": [turn.tokens_per_second for turn in few],
            "resident": [turn.tokens_per_second for turn in resident],
        },
        "ttft": {side: _spread(values) for side, values in waits.items()},
        "resident_longest_wait": [longest_wait(turn.ttfts, turn.ttfts) for turn in resident],
    }
    speeds = [median(turn.tokens_per_second for turn in side) for side in (few, resident)]
    return Outcome(
        ratios={
            "throughput": [one.tokens_per_second / all_.tokens_per_second for one, all_ in turns],
            "wait": [longest_wait(one.ttfts, all_.ttfts) for one, all_ in turns],
        },
        figures=figures,
        summary=(
            f"{speeds[0]:.1f} tokens/s with {ZIPF_SLOTS} slots, {speeds[1]:.1f} with all resident; "
            f"TTFT p50/p95/longest {_spread_text(waits['slots'])}, "
            f"all resident {_spread_text(waits['resident'])} (mean "
            f"{milliseconds(mean(waits['resident']))})"
        ),
    )


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": mean(values),
        "p50": percentile(list(values), 0.5),
        "p95": percentile(list(values), 0.95),
        "max": max(values),
    }


def _spread_text(values: Sequence[float]) -> str:
    spread = _spread(values)
    return " / ".join(milliseconds(spread[key]) for key in ("p50", "p95", "max"))


# --- A short prompt behind a long one


def ttft_prefill(setting: Setting) -> Outcome:
    """The time to first token of a short prompt: idle, and while a long prompt is computed."""
    prompts = setting.prompts("ttft-prefill")
    idle, beside, long_ones = [], [], []
    with own_server(setting.base, setting.logs, setting.options, []) as own:
        own.run([[Job(prompts.make(), None, WARM_UP_TOKENS)]])
        for _ in range(_REPEATS * setting.rounds):
            short, other = (Job(prompts.make(), None, WARM_UP_TOKENS) for _ in range(2))
            idle.append(_first_tokens(own, [[short]])[0])
            long_job = Job(prompts.make(LONG_PROMPT), None, 1)
            waits = _first_tokens(own, [[long_job], [replace(other, delay=_LONG_PROMPT_LEAD)]])
            long_ones.append(waits[0])
            beside.append(waits[1])
    hidden = sum(
        late < _LONG_PROMPT_LEAD + wait for late, wait in zip(long_ones, beside, strict=True)
    )
    if hidden:
        status.print(
            f"warning: in {hidden} of {len(beside)} repeats the long prompt was ready before the "
            "short one's first token"
        )
    return Outcome(
        ratios={"ttft": [late / early for early, late in zip(idle, beside, strict=True)]},
        figures={"idle": idle, "beside": beside, "long_prompt": long_ones},
        summary=(
            f"TTFT of a short prompt {milliseconds(median(idle))} idle, "
            f"{milliseconds(median(beside))} beside a prompt of {LONG_PROMPT} tokens, whose own is "
            f"{milliseconds(median(long_ones))}"
        ),
    )


def _first_tokens(own: HttpSystem, clients: list[list[Job]]) -> list[float]:
    waits = own.run(clients).ttfts
    if len(waits) != len(clients):
        raise BenchmarkError(f"{own.name} gave an answer without any text; run it again")
    return waits


# --- Starting


def start(setting: Setting) -> Outcome:
    """From starting the process to taking traffic, beside plain transformers, in turns."""
    own, plain = [], []
    for repeat in range(_REPEATS * setting.rounds + 1):
        ours, theirs = _own_start(setting), _plain_start(setting.base)
        if repeat:  # the first one fills the disk's cache
            own.append(ours)
            plain.append(theirs)
    return Outcome(
        ratios={"start": [ours / theirs for ours, theirs in zip(own, plain, strict=True)]},
        figures={"own": own, "transformers": plain},
        summary=f"ready after {median(own):.2f} s, transformers loaded after {median(plain):.2f} s",
    )


def _own_start(setting: Setting) -> float:
    begun = time.perf_counter()
    with own_server(setting.base, setting.logs, setting.options, []):
        return time.perf_counter() - begun


def _plain_start(base: str) -> float:
    begun = time.perf_counter()
    command = [sys.executable, "-c", _PLAIN_LOADING, base]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - begun
        _, errors = process.communicate()
    if line.strip() != "loaded":
        raise BenchmarkError(f"transformers does not load {base}: {errors.strip()[-300:]}")
    return seconds


# --- Memory


def memory(setting: Setting) -> Outcome:
    """Resident memory of a ready server, and what loading and unloading leave behind."""
    names = adapter_names(MEMORY_ADAPTERS)
    bounds = ["--kv-memory", _CACHE, "--adapter-memory", _CACHE, "--adapter-host-memory", "0"]
    flags = [*adapter_options(setting.adapters, names), *bounds, *setting.options]
    with own_server(setting.base, setting.logs, flags, names) as own:
        assert own.process is not None
        ready = resident_bytes(own.process)
    configured = setting.weights + 2 * _CACHE_BYTES
    cycles = _cycles(setting)
    before, after = cycles["rss_before_mb"], cycles["rss_after_mb"]
    return Outcome(
        ratios={"ready": [ready / configured], "cycles": [after / before]},
        figures={
            "ready_bytes": ready,
            "weights_bytes": setting.weights,
            "caches_bytes": 2 * _CACHE_BYTES,
            "adapters": MEMORY_ADAPTERS,
            "cycles": cycles,
        },
        summary=(
            f"{ready / 1e6:.0f} MB when ready with {MEMORY_ADAPTERS} adapters loaded, weights and "
            f"caches {configured / 1e6:.0f} MB; {cycles['cycles']} load/unload cycles: "
            f"from {before:.0f} to {after:.0f} MB, {cycles['rss_highest_mb']:.0f} at most"
        ),
    )


def _cycled_folder(adapters: Path) -> Path:
    return adapters / f"cycled-rank-{ZIPF_RANK}"


def _write_for_memory(model: Any, adapters: Path) -> None:
    write_adapters(model, adapters, MEMORY_ADAPTERS)
    write_adapters(model, _cycled_folder(adapters), _CYCLED_ADAPTERS, ZIPF_RANK)


def _cycles(setting: Setting) -> dict[str, Any]:
    script = Path(__file__).with_name("adapter_memory.py")
    count = QUICK_CYCLES if setting.quick else CYCLES
    command = [sys.executable, str(script), "--base", setting.base, "--cycles", str(count)]
    command += ["--adapters", str(_cycled_folder(setting.adapters))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchmarkError(f"{script.name} ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SCENARIOS = (
    Scenario(
        "zipf-1000",
        f"{ZIPF_ADAPTERS} adapters by popularity, {ZIPF_SLOTS} slots",
        zipf,
        _write_zipf,
    ),
    Scenario("ttft-prefill", f"a short prompt behind one of {LONG_PROMPT} tokens", ttft_prefill),
    Scenario("start", "from start to ready", start),
    Scenario("memory", "resident memory", memory, _write_for_memory),
)
