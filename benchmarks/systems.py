"""Getting every system of a run ready, and looking at them before they are measured."""

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import psutil
from peers import (
    LLAMA_NAME,
    PEER_ADAPTERS,
    VLLM_NAME,
    connect_peer,
    differing_answers,
    find_llama_server,
    find_vllm,
    gguf_files,
    llama_server,
    vllm_server,
)
from servers import OWN_NAME, HttpSystem, adapter_options, idle_share, own_server
from workload import BenchmarkError, Case, Job, Measurement, adapter_names

from qlora_serve.base.load import load_base
from qlora_serve.progress import console as status
from qlora_serve.progress import progress

SKIPPABLE = ("transformers", "peft", LLAMA_NAME, VLLM_NAME)
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


def find_binaries(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """llama.cpp's server and vLLM, where they are installed and not left out.

    Raises:
        BenchmarkError: a file that was named is not there, or is left out as well.
    """
    given = {LLAMA_NAME: options.llama_server, VLLM_NAME: options.vllm}
    for name, file in given.items():
        if file is not None and name in options.skip:
            raise BenchmarkError(f"{name} is both named and skipped; drop one of the two")
    llama = None if LLAMA_NAME in options.skip else find_llama_server(options.llama_server)
    vllm = None if VLLM_NAME in options.skip else find_vllm(options.vllm)
    return llama, vllm


def start_systems(
    options: argparse.Namespace,
    cases: list[Case],
    base: Any,
    adapters: Path,
    logs: Path,
    stack: ExitStack,
) -> list[System]:
    """Gets every system ready; servers stop when the stack closes.

    Args:
        options: of the command line.
        cases: what will be measured.
        base: the loaded base, for the peers in this process.
        adapters: the folder that holds the cases' adapters.
        logs: gets the servers' output.
        stack: to which the servers are added.
    """
    llama, vllm = find_binaries(options)
    running: list[System] = [connect_peer(pair) for pair in options.peer]
    path = str(base.source.path)
    names = adapter_names(max(case.adapters for case in cases))
    few = names[:PEER_ADAPTERS]
    with progress("starting qlora-serve"):
        flags = [*adapter_options(adapters, names), *shlex.split(options.serve_options)]
        own = stack.enter_context(own_server(path, logs, flags, names))
    systems: list[System] = [own, *running]
    if llama is not None:
        with progress("starting llama.cpp"):
            flags = shlex.split(options.llama_options)
            server = llama_server(llama, path, adapters, few, logs, flags)
            systems.append(stack.enter_context(server))
    if vllm is not None:
        with progress("starting vLLM, which takes a minute or two"):
            flags = shlex.split(options.vllm_options)
            systems.append(stack.enter_context(vllm_server(vllm, path, adapters, few, logs, flags)))
    return systems + _in_process(options, cases, adapters, base)


def write_peer_files(options: argparse.Namespace, cases: list[Case], adapters: Path) -> None:
    """Writes what the peers need besides the adapters, so that measuring can begin at once."""
    if cases and find_binaries(options)[0] is not None:
        names = adapter_names(max(case.adapters for case in cases))
        gguf_files(options.base, adapters, names[:PEER_ADAPTERS])


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


def check_systems(systems: list[System], cases: list[Case], tokenizer: Any) -> None:
    """Says who takes part in what, and warns of what would make the comparison mean less.

    That is a server that works while it has nothing to do, and one whose answers are not ours.

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
    own = next(system for system in systems if system.name == OWN_NAME)
    assert isinstance(own, HttpSystem)
    for system in systems:
        if system is own or not isinstance(system, HttpSystem):
            continue
        with progress(f"comparing the answers of {system.name}"):
            lines = differing_answers(own, system, tokenizer)
        for line in lines:
            status.print(f"warning: {system.name} answers otherwise: {line}", markup=False)
        if not lines:
            status.print(f"{system.name} gives the same greedy answers")
