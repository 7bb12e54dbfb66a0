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
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import psutil
from report import Results, print_report, write_json, write_svg
from rich.console import Console
from servers import connect_peer, find_llama_server, idle_share, llama_server, own_server
from workload import (
    CASES,
    QUICK_CASES,
    WARM_UP_TOKENS,
    BenchmarkError,
    Case,
    Job,
    Measurement,
    Prompts,
    choose_cases,
    write_adapters,
)

from qlora_serve.base.load import load_base
from qlora_serve.base.source import locate_base
from qlora_serve.errors import QloraServeError
from qlora_serve.progress import console as status
from qlora_serve.progress import progress

QUICK_ROUNDS = 2
ROUNDS = 5
IN_PROCESS = ("transformers", "peft")
SETTLE_SECONDS = 0.3
"""Between turns: threads of the system before stop spinning, caches of the allocator are freed."""
SLOW_WARM_UP_SECONDS = 5
"""What a system does once (loading, packing, compiling) is not measured, but said from here on."""
IDLE_LIMIT = 0.05
"""The share of a core above which an idle server disturbs the others' turns."""


class System(Protocol):
    """What takes turns."""

    name: str
    process: psutil.Process | None

    def supports(self, case: Case) -> bool:
        """Whether it can do the case's work."""

    def run(self, clients: list[list[Job]]) -> Measurement:
        """Runs one turn: for each client the jobs that it sends one after the other."""


def main() -> None:
    """Parses the command line, measures, reports; a user's mistake is one line and exit code 1."""
    options = _parser().parse_args()
    # What is installed and not used, or will change one day, is no news here.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _run(options)
    except QloraServeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure `qlora-serve serve` beside its peers, through HTTP, in turns."
    )
    names = ", ".join(case.name for case in CASES)
    add = parser.add_argument
    add("--base", default="smollm2", help="the base model (default: %(default)s)")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of {', '.join(QUICK_CASES)}")
    add("--rounds", type=int, help=f"turns of each system in each case (default: {ROUNDS})")
    add("--cases", nargs="+", metavar="CASE", help=f"which to measure; of {names}")
    add("--adapters", type=Path, metavar="DIR", help="keep the random adapters here, for peers")
    add("--only-adapters", action="store_true", help="write the adapters and stop")
    add("--skip", nargs="+", default=[], choices=IN_PROCESS, help="in-process peers to leave out")
    add(
        "--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs already"
    )
    add("--llama-server", type=Path, metavar="FILE", help="llama.cpp's server binary")
    add("--llama-gguf", type=Path, metavar="FILE", help="the base as float32 GGUF, for llama.cpp")
    add("--llama-loras", type=Path, nargs="+", default=[], metavar="FILE", help="adapter-0, 1 ...")
    add("--llama-options", default="", help="more options of llama.cpp's server, in one string")
    add("--serve-options", default="", help="more options of qlora-serve serve, in one string")
    add("--json", type=Path, metavar="FILE", help="write every round's figures")
    add("--svg", type=Path, metavar="FILE", help="draw the tokens per second")
    return parser


def _run(options: argparse.Namespace) -> None:
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if rounds < 1:
        raise BenchmarkError(f"--rounds {rounds}: expected at least 1")
    names = options.cases or (QUICK_CASES if options.quick else [case.name for case in CASES])
    cases = choose_cases(names)
    if options.only_adapters and options.adapters is None:
        raise BenchmarkError("--only-adapters needs --adapters DIR, to write them to")
    locate_base(options.base)  # a base that is not there is known at once
    results: Results = {case.name: {} for case in cases}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlora-serve-bench-")))
        adapters = options.adapters or work / "adapters"
        tokenizer, systems = _prepare(options, cases, adapters, work, stack)
        if options.only_adapters:
            status.print(f"the adapters are in {adapters}")
            return
        _check(systems, cases)
        try:
            _measure(systems, cases, rounds, tokenizer, results)
        finally:
            # What was measured before a fault or Ctrl-C is worth reading.
            if any(turns for systems_of in results.values() for turns in systems_of.values()):
                _report(options, cases, results)


def _prepare(
    options: argparse.Namespace, cases: list[Case], adapters: Path, work: Path, stack: ExitStack
) -> tuple[Any, list[System]]:
    """Writes the adapters and gets every system ready; servers stop when the stack closes."""
    import torch

    peers: list[System] = [connect_peer(pair) for pair in options.peer]
    llama = _llama_binary(options)
    count = max(case.adapters for case in cases)
    with progress("preparing the base and the adapters"):
        base = load_base(options.base, dtype="float32")
        write_adapters(base.model, adapters, count)
    if options.only_adapters:
        return base.tokenizer, []
    with progress("starting qlora-serve"):
        more = shlex.split(options.serve_options)
        own = stack.enter_context(own_server(str(base.source.path), adapters, count, work, more))
    systems: list[System] = [own, *peers]
    if llama is not None:
        gguf, loras = options.llama_gguf, options.llama_loras
        more = shlex.split(options.llama_options)
        with progress("starting llama.cpp"):
            server = llama_server(llama, gguf, loras, work, more, torch.get_num_threads())
            systems.append(stack.enter_context(server))
    systems += _in_process(options, cases, adapters, base)
    return base.tokenizer, systems


def _llama_binary(options: argparse.Namespace) -> Path | None:
    """llama.cpp's server, or None where the command line does not ask for it."""
    if options.llama_gguf is None:
        if options.llama_server or options.llama_loras:
            raise BenchmarkError("llama.cpp needs its base too: --llama-gguf FILE")
        return None
    missing = [file for file in (options.llama_gguf, *options.llama_loras) if not file.is_file()]
    if missing:
        raise BenchmarkError(f"no such file: {missing[0]}")
    binary = find_llama_server(options.llama_server)
    if binary is None:
        raise BenchmarkError("no llama-server on the PATH; give --llama-server FILE")
    return binary


def _in_process(
    options: argparse.Namespace, cases: list[Case], adapters: Path, base: Any
) -> list[System]:
    from in_process import Peft, Transformers

    systems: list[System] = []
    if "transformers" not in options.skip:
        systems.append(Transformers(base))
    # As many as a batch that one would still run by hand: beyond it a case has no static peer.
    count = max((case.adapters for case in cases if case.static and case.clients <= 8), default=0)
    if "peft" not in options.skip and count:
        with progress("loading the adapters into PEFT"):
            systems.append(Peft(load_base(options.base, dtype="float32"), adapters, count))
    return systems


def _check(systems: list[System], cases: list[Case]) -> None:
    """Says who takes part in what, and warns of a server that works while it has nothing to do.

    Raises:
        BenchmarkError: two systems share a name.
    """
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchmarkError(f"two systems are called {twice[0]}; give the --peer another name")
    for system in systems:
        able = [case.name for case in cases if system.supports(case)]
        status.print(f"{system.name}: {', '.join(able) or 'can do none of the cases'}")
        if system.process is not None and (share := idle_share(system.process)) > IDLE_LIMIT:
            status.print(
                f"warning: {system.name} takes {share:.0%} of a core while it is idle, "
                "so the others' figures are too low"
            )


def _measure(
    systems: list[System], cases: list[Case], rounds: int, tokenizer: Any, results: Results
) -> None:
    """Fills `results`, round by round; round 0 is the warm-up."""
    for case in cases:
        # The order of the table; that of the turns is another.
        results[case.name] = {system.name: [] for system in systems if system.supports(case)}
    # A peer that outlives this run must not know the next one's prompts.
    salt = secrets.token_hex(8)
    turns = list(_turns(systems, cases, rounds))
    with progress("measuring", len(turns)) as bar:
        for done, (turn, case, system) in enumerate(turns):
            bar.update(done, f"{case.name} {system.name}" + ("" if turn else " (warm-up)"))
            # The seed leaves the system out: within a round, all get the same prompts.
            clients = case.plan(case, Prompts(tokenizer, f"{salt} {case.name} {turn}"))
            if turn == 0:
                clients = [[replace(job, max_tokens=WARM_UP_TOKENS) for job in jobs[:1]]
                           for jobs in clients]  # fmt: skip
            time.sleep(SETTLE_SECONDS)
            measured = system.run(clients)
            if turn:
                results[case.name][system.name].append(measured)
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


def _report(options: argparse.Namespace, cases: list[Case], results: Results) -> None:
    print_report(Console(width=None if sys.stdout.isatty() else 130), cases, results)
    if options.json:
        write_json(options.json, _machine(options.base), cases, results)
    if options.svg:
        write_svg(options.svg, cases, results)


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
