"""Does loading and unloading adapters leave anything behind? Resident memory over many cycles.

    python benchmarks/adapter_memory.py --base BASE --adapters DIR [--cycles 2000]

Loads the adapters of a folder in turn under one name, as `POST /v1/adapters` does, unloads it again
and prints the process's resident memory. The first tenth is for warming up.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import psutil

from qlora_serve.adapters.folder import find_adapters
from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.runner import Runner


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", required=True, type=Path)
    parser.add_argument("--cycles", type=int, default=2000)
    arguments = parser.parse_args()

    registry = AdapterRegistry(Runner(load_base(arguments.base, dtype="float32")))
    paths = list(find_adapters(arguments.adapters).values())
    process = psutil.Process()

    def cycle(number: int) -> None:
        registry.load("name", paths[number % len(paths)])
        registry.unload("name")

    warming = max(1, arguments.cycles // 10)
    for number in range(warming):
        cycle(number)
    gc.collect()
    before = process.memory_info().rss
    highest = before
    start = time.perf_counter()
    for number in range(arguments.cycles):
        cycle(number)
        if number % 50 == 0:
            highest = max(highest, process.memory_info().rss)
    seconds = time.perf_counter() - start
    gc.collect()
    after = process.memory_info().rss
    result = {
        "cycles": arguments.cycles,
        "rss_before_mb": round(before / 1e6, 1),
        "rss_after_mb": round(after / 1e6, 1),
        "rss_highest_mb": round(highest / 1e6, 1),
        "growth_percent": round(100 * (after / before - 1), 2),
        "milliseconds_per_cycle": round(1000 * seconds / arguments.cycles, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
