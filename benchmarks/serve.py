"""Measures `qlora-serve serve` beside its peers, through HTTP, in turns.

    make bench
    .venv/bin/python benchmarks/serve.py --rounds 5 --json results.json --svg results.svg

docs/benchmarks.md says what is measured, how to add peers, and how to read the result.
"""

import argparse
import logging
import os
import platform
import secrets
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from limits import judge
from report import print_report, write_json, write_svg
from results import Outcome, Results
from rich.console import Console
from scenarios import SCENARIOS, Scenario, Setting
from systems import SKIPPABLE, System, check_systems, find_binaries, start_systems, write_peer_files
from workload import (
    CASES,
    QUICK_CASES,
    WARM_UP_TOKENS,
    BenchmarkError,
    Case,
    Prompts,
    require_known,
    write_adapters,
)

from qlora_serve.base.load import load_base
from qlora_serve.base.source import locate_base
from qlora_serve.errors import QloraServeError
from qlora_serve.progress import console as status
from qlora_serve.progress import progress

QUICK_ROUNDS = 2
ROUNDS = 5
SETTLE_SECONDS = 0.3
"""Between turns: threads of the system before stop spinning, caches of the allocator are freed."""
SLOW_WARM_UP_SECONDS = 5
"""What a system does once (loading, packing, compiling) is not measured, but said from here on."""


@dataclass
class _Run:
    """What is asked for, and what has been measured so far."""

    options: argparse.Namespace
    cases: list[Case]
    scenarios: list[Scenario]
    rounds: int
    results: Results = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    # A peer that outlives this run must not know the next one's prompts.
    salt: str = field(default_factory=lambda: secrets.token_hex(8))


def main() -> None:
    """Parses the command line, measures, reports; a user's mistake is one line and exit code 1."""
    options = _parser().parse_args()
    # What is installed and not used, or will change one day, is no news here.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # As Ctrl-C does: the servers must not outlive this process.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(options)
    except QloraServeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure `qlora-serve serve` beside its peers, through HTTP, in turns."
    )
    names = ", ".join(_names())
    add = parser.add_argument
    add("--base", default="smollm2", help="the base model (default: %(default)s)")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of {', '.join(QUICK_CASES)}")
    add("--rounds", type=int, help=f"turns of each system in each case (default: {ROUNDS})")
    add("--cases", nargs="+", metavar="CASE", help=f"which to measure; of {names}")
    add("--adapters", type=Path, metavar="DIR", help="keep adapters and GGUF files here")
    add("--only-adapters", action="store_true", help="write adapters and GGUF files, and stop")
    add("--skip", nargs="+", default=[], choices=SKIPPABLE, help="peers to leave out")
    add("--llama-server", type=Path, metavar="FILE", help="llama.cpp's server, if not on the PATH")
    add("--llama-options", default="", help="more options of llama.cpp's server, in one string")
    add("--vllm", type=Path, metavar="FILE", help="vLLM's executable, if not on the PATH")
    add("--vllm-options", default="", help="more options of vllm serve, in one string")
    add(
        "--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs already"
    )
    add("--serve-options", default="", help="more options of qlora-serve serve, in one string")
    add("--json", type=Path, metavar="FILE", help="write every round's figures")
    add("--svg", type=Path, metavar="FILE", help="draw the tokens per second")
    return parser


def _names() -> list[str]:
    return [case.name for case in CASES] + [scenario.name for scenario in SCENARIOS]


def _plan(options: argparse.Namespace) -> _Run:
    """What the command line asks for.

    Raises:
        BenchmarkError: it asks for what there is not.
    """
    rounds = (
        (QUICK_ROUNDS if options.quick else ROUNDS) if options.rounds is None else options.rounds
    )
    if rounds < 1:
        raise BenchmarkError(f"--rounds {rounds}: expected at least 1")
    names = options.cases or (QUICK_CASES if options.quick else _names())
    require_known(names, _names())
    if options.only_adapters and options.adapters is None:
        raise BenchmarkError("--only-adapters needs --adapters DIR, to write them to")
    locate_base(options.base)  # a base or a peer that is not there is known at once
    find_binaries(options)
    return _Run(
        options,
        [case for case in CASES if case.name in names],
        [scenario for scenario in SCENARIOS if scenario.name in names],
        rounds,
    )


def _run(options: argparse.Namespace) -> None:
    run = _plan(options)
    with tempfile.TemporaryDirectory(prefix="qlora-serve-bench-") as folder:
        work = Path(folder)
        adapters = options.adapters or work / "adapters"
        base = _prepare(run, adapters)
        if options.only_adapters:
            write_peer_files(options, run.cases, adapters)
            status.print(f"the adapters are in {adapters}")
            return
        setting = Setting(
            base=str(base.source.path),
            weights=4 * sum(weight.numel() for weight in base.model.parameters()),
            tokenizer=base.tokenizer,
            adapters=adapters,
            logs=work,
            salt=run.salt,
            options=shlex.split(options.serve_options),
            rounds=run.rounds,
            quick=options.quick,
        )
        try:
            if run.cases:
                with ExitStack() as stack:
                    systems = start_systems(options, run.cases, base, adapters, work, stack)
                    check_systems(systems, run.cases, base.tokenizer)
                    _measure(run, systems, base.tokenizer)
                    del systems
            del base
            for scenario in run.scenarios:
                with progress(f"{scenario.name}: {scenario.meaning}"):
                    run.outcomes[scenario.name] = scenario.run(setting)
        finally:
            # What was measured before a fault or Ctrl-C is worth reading.
            if run.outcomes or any(turns for of in run.results.values() for turns in of.values()):
                _report(run)


def _prepare(run: _Run, adapters: Path) -> Any:
    """Loads the base and writes the adapters that are missing."""
    count = max((case.adapters for case in run.cases), default=0)
    with progress("preparing the base and the adapters"):
        base = load_base(run.options.base, dtype="float32")
        write_adapters(base.model, adapters, count)
        for scenario in run.scenarios:
            scenario.prepare(base.model, adapters)
    return base


def _measure(run: _Run, systems: list[System], tokenizer: Any) -> None:
    """Fills the results, round by round; round 0 is the warm-up."""
    for case in run.cases:
        # The order of the table; that of the turns is another.
        run.results[case.name] = {system.name: [] for system in systems if system.supports(case)}
    turns = list(_turns(systems, run.cases, run.rounds))
    with progress("measuring", len(turns)) as bar:
        for done, (turn, case, system) in enumerate(turns):
            bar.update(done, f"{case.name} {system.name}" + ("" if turn else " (warm-up)"))
            # The seed leaves the system out: within a round, all get the same prompts.
            clients = case.plan(case, Prompts(tokenizer, f"{run.salt} {case.name} {turn}"))
            if turn == 0:
                clients = [[replace(job, max_tokens=WARM_UP_TOKENS) for job in jobs[:1]]
                           for jobs in clients]  # fmt: skip
            time.sleep(SETTLE_SECONDS)
            measured = system.run(clients)
            if turn:
                run.results[case.name][system.name].append(measured)
            elif measured.seconds > SLOW_WARM_UP_SECONDS:
                status.print(f"{system.name} warmed up for {case.name} in {measured.seconds:.0f} s")


def _turns(
    systems: list[System], cases: list[Case], rounds: int
) -> Iterator[tuple[int, Case, System]]:
    """The order of the turns; round 0 is the warm-up, with few tokens.

    The order of the systems is turned around from case to case, so that cases which are compared
    within a system (`base-8`, `adapters-8`) are measured close to one another.
    """
    for turn in range(rounds + 1):
        for number, case in enumerate(cases):
            able = [system for system in systems if system.supports(case)]
            for system in able if number % 2 else reversed(able):
                yield turn, case, system


def _report(run: _Run) -> None:
    names = [case.name for case in run.cases] + [scenario.name for scenario in run.scenarios]
    verdicts = judge(names, run.results, run.outcomes)
    console = Console(width=None if sys.stdout.isatty() else 130)
    print_report(console, run.cases, run.results, run.outcomes, verdicts)
    options = run.options
    if options.json:
        machine = _machine(options.base)
        write_json(options.json, machine, run.cases, run.results, run.outcomes, verdicts)
    if options.svg and run.cases:
        write_svg(options.svg, run.cases, run.results)


def _machine(base: str) -> dict[str, Any]:
    import torch

    packages = ("qlora-serve", "torch", "transformers", "peft")
    return {
        "base": base,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


if __name__ == "__main__":
    main()
