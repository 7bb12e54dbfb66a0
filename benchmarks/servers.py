"""Servers: asking one through HTTP, starting and stopping one, and our own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from load_client import HttpJob, measure
from workload import BenchmarkError, Case, Job, Measurement, adapter_names

OWN_NAME = "qlora-serve"

_LISTENING = re.compile(r"listening on (http://\S+?/v1)")
_START_SECONDS = 600
_STOP_SECONDS = 30
_ANSWER_SECONDS = 300


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
        return has_room and self.has(adapter_names(case.adapters))

    def has(self, adapters: list[str]) -> bool:
        """Whether it knows all of these adapters."""
        return self._adapters.issuperset(adapters)

    def run(self, clients: list[list[Job]]) -> Measurement:
        """Runs one turn."""
        try:
            return measure(
                self._url,
                [[HttpJob(self.body(job), job.delay) for job in jobs] for jobs in clients],
            )
        except BenchmarkError as error:
            raise BenchmarkError(f"{self.name}: {error}") from None

    def answer(self, job: Job) -> str:
        """The text of one answer, outside any measurement."""
        body = self.body(job) | {"stream": False}
        del body["stream_options"]
        try:
            response = httpx.post(
                f"{self._url}/chat/completions",
                json=body,
                timeout=_ANSWER_SECONDS,
                trust_env=False,
            )
            if response.is_error:
                raise BenchmarkError(
                    f"{self.name} refused a request with {response.status_code}: "
                    f"{response.text[:300]}"
                )
            return str(response.json()["choices"][0]["message"]["content"])
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise BenchmarkError(f"{self.name} does not answer: {reason}") from None

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


@contextmanager
def own_server(
    base: str, logs: Path, options: Sequence[str], adapters: list[str], name: str = OWN_NAME
) -> Iterator[HttpSystem]:
    """Starts `qlora-serve serve` and waits until it takes traffic.

    Args:
        base: the base model.
        logs: gets its output.
        options: of its command line, those that name the adapters among them.
        adapters: the names that are known to the cases.
        name: in messages and results.
    """
    command = [sys.executable, "-m", "qlora_serve.cli", "serve", base, "--port", "0"]
    command += ["--dtype", "float32", *options]

    def listening(log: str) -> str | None:
        found = _LISTENING.search(log)
        return found[1] if found else None

    with started_server(name, command, logs, listening, poll=0.02) as (url, process):
        _await_ready(name, url.removesuffix("/v1") + "/ready")
        system = HttpSystem(name, url, "base", adapters)
        system.process = process
        yield system


def adapter_options(folder: Path, names: list[str]) -> list[str]:
    """The flags that serve the named directories of a folder."""
    return [flag for name in names for flag in ("--adapter", f"{name}={folder / name}")]


def resident_bytes(process: psutil.Process) -> int:
    """The resident memory of a server and its children."""
    tree = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in tree)


def idle_share(process: psutil.Process, seconds: float = 1.0) -> float:
    """The share of one core that a server and its children take while nobody asks it anything."""

    def used() -> float:
        tree = [process, *process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in tree)

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


@contextmanager
def started_server(
    name: str,
    command: list[str],
    logs: Path,
    ready: Callable[[str], str | None],
    poll: float = 0.5,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, psutil.Process]]:
    """Runs a server until the block ends.

    Args:
        name: in messages and of its log.
        command: its command line.
        logs: gets its output.
        ready: gives the URL of its API when it can be used, from the log so far.
        poll: seconds between two looks.
        environment: more variables for it.

    Raises:
        BenchmarkError: it ended, or was not ready in time.
    """
    log = logs / f"{name}.log"
    with log.open("wb") as output:
        # A group of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
    try:
        url = _wait_until_ready(name, process, log, ready, poll)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_ready(name: str, url: str) -> None:
    """Asks until a server that listens takes traffic."""
    deadline = time.monotonic() + _START_SECONDS
    with httpx.Client(trust_env=False, timeout=_START_SECONDS) as http:
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if http.get(url).status_code == 200:
                    return
            time.sleep(0.01)
    raise BenchmarkError(f"{name} was not ready after {_START_SECONDS} s: {url}")


def _wait_until_ready(
    name: str,
    process: subprocess.Popen[bytes],
    log: Path,
    ready: Callable[[str], str | None],
    poll: float,
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
        time.sleep(poll)
    raise BenchmarkError(f"{name} was not ready after {_START_SECONDS} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
