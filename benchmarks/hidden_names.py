"""How long it takes to refuse an adapter that a key may not use, and one that does not exist.

python benchmarks/hidden_names.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from tiny_server import tiny_server

from qlora_serve.serve.keys import add_key

_HIDDEN, _ABSENT = "a1", "zz"


def refusals(url: str, key: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each refusal, by name."""
    headers = {"authorization": f"Bearer {key}"}
    times: dict[str, list[float]] = {_HIDDEN: [], _ABSENT: []}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
        for turn in range(rounds + 20):
            for name in sorted(times, reverse=bool(turn % 2)):  # neither is always the first
                body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
                began = time.perf_counter()
                answer = http.post("/v1/chat/completions", json=body)
                if turn >= 20:
                    times[name].append(time.perf_counter() - began)
                assert answer.status_code == 404, answer.text
    return times


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder)) as server:
        key, _ = add_key(Path(folder) / "keys.json", name="some", adapters=("a0",))
        times = refusals(server.url, key, options.rounds)
    for name, what in ((_HIDDEN, "hidden"), (_ABSENT, "unknown")):
        low, middle, high = statistics.quantiles(times[name], n=4)
        print(
            f"{what}: median {middle * 1e3:.3f} ms, quartiles {low * 1e3:.3f} to {high * 1e3:.3f}"
        )


if __name__ == "__main__":
    main()
