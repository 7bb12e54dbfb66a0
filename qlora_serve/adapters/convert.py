"""Pickled adapters into safetensors, in a process of its own, and only when asked for."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_serve.adapters.archive import is_archive
from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from qlora_serve.adapters.sources import (
    DEFAULT_MAX_BYTES,
    adapter_in_archive,
    copy_adapter,
    relabelled,
)
from qlora_serve.errors import AdapterError
from qlora_serve.files import disk_errors, published_directory, require_free_output

PICKLE_FILE = "adapter_model.bin"

_WORKER = Path(__file__).with_name("pickle_worker.py")
_CPU_SECONDS = 120
_WALL_SECONDS = 300
# A pickle is held twice while it is copied out of shared storages, and once more being written.
_MEMORY_FACTOR = 4
_MEMORY_FLOOR = 256 << 20


def convert_adapter(source: Path, target: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> list[str]:
    """Writes the adapter of `source`, whose weights are a pickle, with safetensors to `target`.

    The pickle is read by torch's weights-only loader, which builds tensors and runs nothing else,
    in a separate process with limits on time, memory and output.

    Args:
        source: a directory with adapter_model.bin, or an archive of one.
        target: a new directory.
        max_bytes: what an archive may unpack to.

    Returns:
        Names of files that were left out.

    Raises:
        AdapterError: there is no such pickle, or it holds anything but tensors.
        OutputError: `target` holds something, or the disk is full.
    """
    require_free_output(target)
    if not source.is_file():
        return _convert_directory(source, target)
    if not is_archive(source):
        raise AdapterError(f"{source} is a file; expected a directory with {PICKLE_FILE}")
    with disk_errors(target), tempfile.TemporaryDirectory(prefix="qlora-serve-") as scratch:
        found = adapter_in_archive(source, max_bytes, Path(scratch))
        return relabelled(lambda: _convert_directory(found, target), found, str(source))


def _convert_directory(source: Path, target: Path) -> list[str]:
    if not source.is_dir():
        raise AdapterError(f"no adapter at {source}: no such directory")
    if (source / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{source} already has {WEIGHTS_FILE}; nothing is to be converted")
    pickle = source / PICKLE_FILE
    if not pickle.is_file():
        raise AdapterError(f"{source} has no {PICKLE_FILE}, which is what can be converted")
    if not (source / CONFIG_FILE).is_file():
        raise AdapterError(f"{source} has no {CONFIG_FILE}, so it is not a PEFT adapter")
    with published_directory(target) as staging:
        left_out = copy_adapter(source, staging, weights_required=False)
        _run_worker(pickle.resolve(), staging / WEIGHTS_FILE)
        relabelled(lambda: read_adapter(staging), staging, str(source))
    return [name for name in left_out if name != PICKLE_FILE]


def _run_worker(pickle: Path, output: Path) -> None:
    memory = _MEMORY_FACTOR * pickle.stat().st_size + _MEMORY_FLOOR
    arguments = [str(pickle), str(output), str(memory), str(_CPU_SECONDS)]
    # Nothing of ours goes along: no tokens, no paths to import from.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_WORKER), *arguments],
            env=kept | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AdapterError(
            f"{pickle} was not read within {_WALL_SECONDS} s; it is no honest checkpoint"
        ) from None
    answer = _answer(done.stdout)
    if "tensors" in answer and done.returncode == 0:
        return
    reason = answer.get("error") or (
        f"reading it took more memory or time than its size allows (exit {done.returncode})"
    )
    raise AdapterError(f"{pickle} cannot be converted: {reason}")


def _answer(text: str) -> dict[str, str]:
    lines = text.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
