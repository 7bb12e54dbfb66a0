"""A merge that is killed leaves nothing half: whatever it writes appears whole or not at all."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import write_random_adapter

KINDS = {
    "streamed": ["--streaming", "on"],
    "in-memory": ["--streaming", "off"],
    "gguf": ["--gguf", "f16", "--gguf", "q8_0"],
    "nf4": ["--quantize", "nf4"],
    "gptq": ["--quantize", "gptq", "--gptq-group-size", "32"],
}
KILLS = 4


def sizes(folder: Path) -> dict[str, int]:
    """File → its size; of the report, whose length differs, only that it is there."""
    return {
        str(file.relative_to(folder)): 0 if file.suffix == ".json" else file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def has_ended(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(timeout=within)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill_once_it_writes(process: subprocess.Popen[bytes], folder: Path, after: float) -> bool:
    """Kills a merge some seconds after it has begun to write; tells whether it was quicker."""
    while not any(folder.iterdir()) and not has_ended(process, within=0.01):
        pass
    if not has_ended(process, within=after):
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_writing(tiny, tmp_path, kind):
    for package in {"nf4": ["bitsandbytes"], "gptq": ["gptqmodel", "optimum"]}.get(kind, []):
        pytest.importorskip(package)
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama-untied"))
    folder = tmp_path / "outputs"
    call = [sys.executable, "-m", "qlora_serve.cli", "merge", str(adapter), *KINDS[kind]]
    call += ["--output", str(folder / "merged"), "--max-shard-size", "100KB"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[bytes]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        hidden = subprocess.DEVNULL
        return subprocess.Popen(call, env=environment, stdout=hidden, stderr=hidden)

    undisturbed = start()
    kill_once_it_writes(undisturbed, folder, after=600)
    assert undisturbed.returncode == 0
    written = min(file.stat().st_mtime for file in (folder / "merged").rglob("*"))
    takes = max(path.stat().st_mtime for path in folder.rglob("*")) - written
    whole = {path.name: sizes(path) for path in visible(folder)}
    assert len(whole) == (2 if kind in ("nf4", "gptq") else 1)

    chance, killed, is_cleaned = random.Random(kind), 0, False
    for _ in range(KILLS):
        was_quicker = kill_once_it_writes(start(), folder, chance.uniform(0, 1.2) * takes)
        killed += not was_quicker
        for path in visible(folder):
            assert sizes(path) == whole[path.name], path.name
        assert not was_quicker or len(visible(folder)) == len(whole)
        # What it left is hidden, and goes with the next merge into the same place.
        hidden = [path for path in folder.iterdir() if path not in visible(folder)]
        assert len(hidden) <= 1
        if hidden and not visible(folder) and not is_cleaned:
            is_cleaned = True
            subprocess.run(call, env=environment, check=True, capture_output=True)
            assert {path.name: sizes(path) for path in folder.iterdir()} == whole
    assert killed
