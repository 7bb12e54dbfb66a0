"""Steps of the engine in process, without HTTP: milliseconds of prompts and of decoding.

.venv/bin/python benchmarks/steps.py --adapters bench-adapters
"""

import argparse
import queue
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from workload import PROMPT_TOKENS, adapter_names, write_adapters

from qlora_serve.base.load import load_base
from qlora_serve.serve.api.service import Service
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.request import Delta, Event, GenerationRequest, Sampling
from qlora_serve.serve.run import build_service

CASES = ((1, False), (1, True), (8, False), (8, True), (32, False), (32, True))
STEPS = 24
MOST = 32


def main() -> None:
    """Prints a line for each number of sequences, without and with adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument(
        "--adapters", type=Path, required=True, help="written if they are not there"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    write_adapters(load_base(options.base, dtype="float32").model, options.adapters, MOST)
    names = adapter_names(MOST)
    service = build_service(
        ServeSettings(
            base=options.base, dtype="float32", adapter_memory="1500MB", kv_memory="512MB",
            adapter={name: options.adapters / name for name in names}, prefix_cache=False,
        )
    )  # fmt: skip
    service.engine.start()
    results: dict[tuple[int, bool], list[tuple[float, float]]] = {case: [] for case in CASES}
    for turn in range(options.rounds + 1):
        for count, adapters in CASES:
            found = one_turn(service, names if adapters else [], count)
            if turn:
                results[count, adapters].append(found)
    service.close()
    print("sequences            prompts      a step")
    for (count, adapters), turns in results.items():
        prompts, step = (statistics.median(turn[part] for turn in turns) for part in (0, 1))
        what = f"{count} adapters" if adapters else "base"
        print(f"{count:>2} of the {what:<12} {prompts:7.1f} ms {step:7.2f} ms")


def one_turn(service: Service, names: list[str], count: int) -> tuple[float, float]:
    """Milliseconds until every sequence has its first token, and of a step after that."""
    chance = random.Random(time.time_ns())
    arrived: list[list[float]] = [[] for _ in range(count)]
    done: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def deliver_to(times: list[float]) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            if isinstance(event, Delta):
                times.append(time.perf_counter())
            else:
                done.put(event)

        return deliver

    begun = time.perf_counter()
    for number, times in enumerate(arrived):
        adapter = service.choose(None, names[number % len(names)] if names else None)
        prompt = tuple(chance.randrange(1000, 40000) for _ in range(PROMPT_TOKENS))
        sampling = Sampling(max_tokens=STEPS + count, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"{begun}-{number}", prompt, sampling, adapter)
        service.engine.submit(request, deliver_to(times))
    for _ in range(count):
        done.get(timeout=300)
    latest = max(arrived, key=lambda times: times[0])
    ready, last = latest[0], min(times[-1] for times in arrived)
    # Steps in which all of them decode. A token without text of its own comes with the next.
    steps = [late - early for early, late in pairwise(latest) if late <= last]
    return (ready - begun) * 1e3, statistics.median(steps) * 1e3


if __name__ == "__main__":
    main()
