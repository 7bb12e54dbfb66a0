"""No memory left: the adapter that was to be loaded fails, in words, and the rest goes on."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.adapters.shortage import needs_memory
from qlora_serve.errors import AdapterError, ConfigError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.run import build_service


@pytest.mark.parametrize(
    "allocate",
    [lambda: bytes(1 << 62), lambda: mmap.mmap(-1, 1 << 55), lambda: torch.empty(1 << 55)],
)
def test_whatever_says_that_memory_ran_out_becomes_one_line(allocate: Callable) -> None:
    words = "no memory left to load adapter 'it'; unload"
    with pytest.raises(AdapterError, match=words), needs_memory("it"):
        allocate()


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), needs_memory("it"):
        torch.zeros(3).view(2)


def test_more_room_for_keys_than_the_machine_has_is_refused(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    settings = ServeSettings(base=str(base), kv_memory="900TB")
    with pytest.raises(ConfigError, match="--kv-memory 900TB is more than all memory"):
        build_service(settings)


_SCRIPT = """
import queue, resource, sys
from pathlib import Path
from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.engine import Engine
from qlora_serve.serve.engine.registry import AdapterRegistry
from qlora_serve.serve.engine.request import Delta, GenerationRequest, Sampling
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Limits

base, small, large = map(Path, sys.argv[1:])
runner = Runner(load_base(str(base), dtype="float32"))
registry = AdapterRegistry(runner)
registry.load("small", small)
engine = Engine(runner, Limits(2, 400, 64, 100), registry.residency)
registry.residency.wake = engine.wake
engine.start()

def answers(name):
    events = queue.Queue()
    adapter = registry.select([(name, None)])
    runner.release_threads()  # of this thread, which has just loaded
    engine.submit(GenerationRequest(name, (5, 6, 7), Sampling(4, 0.0), adapter), events.put)
    while isinstance(event := events.get(timeout=60), Delta):
        pass
    return type(event).__name__

assert answers("small") == "Finished"
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, most))
try:
    registry.load("large", large)
except AdapterError as error:
    print(error)
assert answers("small") == "Finished"
resource.setrlimit(resource.RLIMIT_AS, (most, most))
registry.load("large", large)
assert answers("large") == "Finished"
engine.stop()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and reads its memory as Linux does")
def test_a_process_without_memory_goes_on_and_loads_it_later(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    small = write_random_adapter(tmp_path / "small", base)
    large = write_random_adapter(tmp_path / "large", base, r=8000)  # 98 MB
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(base), str(small), str(large)],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("there is no memory left to load adapter 'large'; unload others")
