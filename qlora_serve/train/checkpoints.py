"""Checkpoints: whole or absent, and only ever continued by the run that they belong to.

A checkpoint is an adapter directory (or a model's, with `--method full`) with the state of the
optimizer, the schedule and the random generators beside it. `run.json` in it says which run it
belongs to: every setting and input on which the numbers depend.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_serve.base.identity import read_header
from qlora_serve.errors import OutputError, TrainError
from qlora_serve.files import published_directory
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.data import ChatRow
from qlora_serve.train.parallel import is_main, shared, together

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"

# Settings that change nothing in the numbers of a run: where it writes, and what it shows.
_FREE = frozenset(
    {"output", "save_every", "keep", "resume", "sample_prompt", "sample_rows", "sample_tokens",
     "unquantized_base",
     "load_best", "rendezvous", "data", "base", "eval_data",
     "eval_split", "rows"}
)  # fmt: skip


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a directory, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name[11:])


def newest_whole(folder: Path, before: int | None = None) -> Path | None:
    """The newest checkpoint that can be continued, of those from before a step."""
    found = [p for p in find_checkpoints(folder) if before is None or step_of(p) < before]
    return next((path for path in reversed(found) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are all there. Each appears in one rename, so that only a
    faulty disk or a hand can have broken it."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            read_header(file)
    except (OSError, ValueError):
        return False
    return bool(weights)


def run_identity(
    settings: TrainSettings,
    base_fingerprint: str,
    rows: Sequence[ChatRow],
    held_out: Sequence[ChatRow],
) -> dict[str, Any]:
    """What a run's numbers depend on, by name."""
    dumped = settings.model_dump(mode="json")
    return {name: value for name, value in dumped.items() if name not in _FREE} | {
        "the base's weights": base_fingerprint,
        "the data": _digest(rows),
        "the held-out data": _digest(held_out),
    }


def _digest(rows: Sequence[ChatRow]) -> str:
    """Of what the rows say and their order, whatever files they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.content_key())
    return digest.hexdigest()


def require_same_run(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Checks that a checkpoint belongs to this run.

    Raises:
        TrainError: it does not; names each thing that changed, as it was and as it is.
    """
    saved = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    # A setting that one of the two versions did not know yet has its default in both.
    names = [name for name in identity if name in saved and saved[name] != identity[name]]
    if names:
        changes = ", ".join(_change(name, saved[name], identity[name]) for name in names)
        raise TrainError(
            f"{checkpoint} belongs to another run: {changes}; resume with what it was started "
            "with, or name another output directory"
        )


def _change(name: str, before: Any, now: Any) -> str:
    if name.startswith("the "):
        return f"{name} changed"
    return f"{name} was {_shown(before)} and is {_shown(now)}"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def published_together(target: Path) -> Iterator[Path]:
    """`files.published_directory` for a directory that all processes of the run fill.

    Raises:
        OutputError: the disk is full, in any process.
    """
    staging_of_main = published_directory(target) if is_main() else None
    with together():
        own = staging_of_main.__enter__() if staging_of_main is not None else None
    staging = Path(shared(str(own)))
    try:
        with together():
            yield staging
    except BaseException as error:
        if staging_of_main is not None:
            staging_of_main.__exit__(type(error), error, error.__traceback__)
        raise
    with together():
        if staging_of_main is not None:
            staging_of_main.__exit__(None, None, None)


def remove_old(folder: Path, keep: int, best: int | None) -> None:
    """Removes all but the newest checkpoints and the best one.

    Args:
        folder: of the checkpoints.
        keep: how many to keep.
        best: the step of the best one, which is kept besides.
    """
    for old in find_checkpoints(folder)[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Removes checkpoints that a killed run had only half written."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def torch_write_errors(target: Path) -> Iterator[None]:
    """Recognizes a failed `torch.save`, which loses the system's reason."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OutputError(
            f"cannot write {target}: the optimizer's state could not be written whole; the disk "
            "may be full"
        ) from error
