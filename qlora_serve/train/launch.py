"""Several processes for one run: started by torchrun, watched, and stopped together.

The process that the user started does not train. It runs torchrun, which runs a worker for each
GPU; the worker with rank 0 reports. How a run ended is read from a file each worker leaves in a
directory of the launch, since torchrun itself only knows exit codes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import Manifest, read_manifest
from qlora_serve.errors import TrainError
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.interrupt import forward_signals

WORKER_FOLDER = "QLORA_SERVE_LAUNCH"
"""The environment variable that names the directory of the launch."""
STOPPED = "stopped"


def needs_launch(settings: TrainSettings) -> bool:
    """Whether a run takes processes of its own; DeepSpeed wants torchrun even for one."""
    return settings.is_distributed or settings.deepspeed is not None


def is_worker() -> bool:
    """Whether this process is one of those."""
    return WORKER_FOLDER in os.environ


def launch(settings: TrainSettings) -> Manifest:
    """Runs a training run in processes of its own, until it has ended.

    Raises:
        TrainError: a process failed; its message is the first one's.
        KeyboardInterrupt: someone asked to stop.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-serve-launch-") as name:
        folder = Path(name)
        (folder / "settings.json").write_text(settings.model_dump_json(), encoding="utf-8")
        process = subprocess.Popen(
            _command(settings, folder),
            env=os.environ | {WORKER_FOLDER: str(folder)} | _thread_setting(settings),
            # Libraries greet there; what the run has to say goes to stderr.
            stdout=subprocess.DEVNULL,
            # Ctrl-C would reach the workers twice: from the terminal and from here.
            start_new_session=True,
        )
        with forward_signals(lambda: _ask_to_stop(folder)) as stop:
            code = process.wait()
        _raise_if_failed(folder, code, stop.asked)
    manifest = read_manifest(settings.output)
    if manifest is None:
        raise TrainError(
            f"{settings.output} is not here; the machines of a run must share its storage"
        )
    return manifest


def _command(settings: TrainSettings, folder: Path) -> list[str]:
    arguments = [f"--nproc-per-node={settings.processes}", f"--nnodes={settings.nodes}"]
    if settings.nodes == 1:
        arguments.append("--standalone")
    else:
        arguments += [
            f"--node-rank={settings.node_rank}",
            "--rdzv-backend=static",
            f"--rdzv-endpoint={settings.rendezvous}",
        ]
    module = "qlora_serve.train.worker"
    launcher = [sys.executable, "-m", "qlora_serve.train.torchrun"]
    return [*launcher, *arguments, "-m", module, str(folder / "settings.json")]


def _thread_setting(settings: TrainSettings) -> dict[str, str]:
    # torchrun gives each process one thread, unless told otherwise.
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // settings.processes))}


def _ask_to_stop(folder: Path) -> None:
    """Tells the workers themselves: torchrun would give them 30 s and then kill them."""
    for file in folder.glob("*.pid"):
        try:
            os.kill(int(file.read_text()), signal.SIGTERM)
        except (ProcessLookupError, ValueError):
            continue


def leave_note(kind: str, message: str) -> None:
    """Leaves word of how a worker ended, for the process that started it."""
    folder = Path(os.environ[WORKER_FOLDER])
    file = folder / f"{os.environ.get('RANK', '0')}.end"
    staging = file.with_suffix(".part")
    staging.write_text(json.dumps({"kind": kind, "message": message}), encoding="utf-8")
    staging.rename(file)


def _raise_if_failed(folder: Path, code: int, asked: bool) -> None:
    notes = sorted(folder.glob("*.end"), key=lambda file: file.stat().st_mtime_ns)
    ends: list[dict[str, Any]] = [json.loads(file.read_text()) for file in notes]
    if any(end["kind"] == STOPPED for end in ends) or (asked and code != 0):
        raise KeyboardInterrupt
    if code == 0:
        return
    for end in ends:
        raise TrainError(end["message"])
    raise TrainError(
        "a training process ended without a word (killed, perhaps for want of memory, or crashed: "
        "see above), so the others were stopped"
    )
