"""A server of a tiny random base with a key, for what is measured or counted beside the model."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = "kept-private"
"""Part of every prompt."""
ADAPTERS = 4
_TIMEOUT = 120.0


class SoakError(Exception):
    """Something that must not happen did."""


@dataclass
class Server:
    """A running server."""

    url: str
    process: psutil.Process
    key: str
    log: Path
    folder: Path
    """With `adapters` and `elsewhere`."""

    def client(self) -> httpx.AsyncClient:
        """A client with the key."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, limits=limits,
            timeout=_TIMEOUT, trust_env=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What the server's process holds."""

    megabytes: float
    handles: int
    threads: int


@contextmanager
def tiny_server(folder: Path) -> Iterator[Server]:
    """Serves a tiny random base with adapters, with a key, logging JSON to a file."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_random_adapter, write_tiny_model

    from qlora_serve.serve.keys import add_key

    base = write_tiny_model(folder / "tiny")
    for number in range(ADAPTERS):
        # The last ones come and go.
        where = "adapters" if number < ADAPTERS // 2 else "elsewhere"
        write_random_adapter(folder / where / f"a{number}", base, seed=number, r=2 + number)
    key, _ = add_key(folder / "keys.json", name="soak", scopes=("infer", "admin"))
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "qlora_serve.cli", "serve", base, "--port", "0",
        "--adapters-dir", folder / "adapters", "--adapter-root", folder / "elsewhere",
        "--keys", folder / "keys.json", "--log-format", "json", "--kv-memory", "8MB",
        "--adapter-memory", "120KB", "--adapters-poll", "0.5", "--max-sequences", "16",
        "--dtype", "float32",
    ]  # fmt: skip
    # A tiny model gains nothing from a second thread, and the clients need a core as well.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            list(map(str, command)), stderr=stderr, cwd=ROOT, env=environment
        )
    try:
        url = _wait_until_listening(process, log)
        yield Server(url, psutil.Process(process.pid), key, log, folder)
    except BaseException as error:
        error.add_note(f"the server's log ends: {log.read_text()[-3000:]}")
        raise
    finally:
        died = process.poll()
        process.terminate()
        code = process.wait(timeout=60)
        if died is not None:  # whatever a client has said about it
            raise SoakError(f"the server died, exit code {died}: {log.read_text()[-2000:]}")
    if code != 0:
        raise SoakError(f"the server ended with exit code {code}: {log.read_text()[-2000:]}")


def _wait_until_listening(process: subprocess.Popen[bytes], log: Path) -> str:
    mark = "listening on "
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text()
        if mark in text and "/v1" in text.split(mark)[1]:
            return text.split(mark)[1].split("/v1")[0]
        time.sleep(0.1)
    raise SoakError(f"the server did not start: {log.read_text()[-2000:]}")


def gauges(page: str) -> dict[str, float]:
    """The values on the page of `/metrics`."""
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def usage(process: psutil.Process) -> Usage:
    """What it holds now."""
    # Sockets on which the other end has hung up are closed within a moment.
    time.sleep(0.5)
    megabytes = process.memory_info().rss / 1e6
    return Usage(round(megabytes, 1), process.num_fds(), process.num_threads())
