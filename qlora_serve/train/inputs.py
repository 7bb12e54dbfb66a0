"""What a run begins with, checked before torch is imported where it can be.

torch takes seconds to import. A misspelt file name, a taken output or a contradiction is answered
at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, ConfigError, OutputError
from qlora_serve.files import require_free_output
from qlora_serve.train.checkpoints import newest_whole
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.data import ChatRow
from qlora_serve.train.fsdp import check_fsdp
from qlora_serve.train.launch import needs_launch
from qlora_serve.train.parallel import local_rank
from qlora_serve.train.prepare import RunData, longest_rows, read_run_data
from qlora_serve.train.record import base_name
from qlora_serve.train.zero import check_stage


@dataclass(frozen=True)
class RunInputs:
    """What a run begins with."""

    data: RunData
    source: BaseSource
    unquantized: str | None
    max_length: int
    resume_from: Path | None


def check_inputs(settings: TrainSettings) -> RunInputs:
    """Checks all of a run that can be checked without torch.

    Raises:
        BaseModelError: the base does not exist, or cannot be merged into later as it is told.
        ConfigError: settings contradict each other, the data, or the base.
        DataError: the data cannot be read.
        OutputError: the output is taken, or there is nothing to resume.
    """
    resume_from = _check_outputs(settings)
    data = read_run_data(settings, settings.seed)
    _check_samples(settings, data)
    if data.evaluation is None and settings.eval_every:
        raise ConfigError("eval_every: no rows are held out; see --eval-split and --eval-data")
    source = locate_base(settings.base)
    check_stage(settings, source.quantization)
    check_fsdp(settings, source.quantization)
    unquantized = _unquantized(settings, source)
    max_length = longest_rows(settings.max_length, source)
    return RunInputs(data, source, unquantized, max_length, resume_from)


def _check_outputs(settings: TrainSettings) -> Path | None:
    """The checkpoint to resume from, if the run is to be resumed."""
    require_free_output(settings.output)
    if not settings.resume:
        try:
            require_free_output(settings.checkpoints)
        except OutputError:
            raise OutputError(
                f"{settings.checkpoints} holds the checkpoints of an earlier run; go on with it by "
                "--resume, remove it, or name another output directory"
            ) from None
        return None
    newest = newest_whole(settings.checkpoints)
    if newest is None:
        raise OutputError(
            f"--resume: {settings.checkpoints} holds no whole checkpoint; leave --resume out to "
            "start again"
        )
    return newest


def _unquantized(settings: TrainSettings, source: BaseSource) -> str | None:
    """The base that a merge of this adapter will load."""
    if source.quantization == "none":
        if settings.unquantized_base is not None:
            raise ConfigError(
                f"unquantized_base: {settings.base} is itself unquantized; leave the setting out"
            )
        return base_name(source)
    if settings.unquantized_base is None:
        return source.unquantized
    named = locate_base(settings.unquantized_base)
    if named.quantization != "none":
        raise BaseModelError(
            f"--unquantized-base {settings.unquantized_base} is quantized ({named.quantization}); "
            "name the base that it was made from"
        )
    return base_name(named)


def own_device(settings: TrainSettings) -> str:
    """The device of this process: one GPU each.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    if settings.device != "auto" or not needs_launch(settings):
        return settings.device
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"processes: {settings.processes} on a machine with {torch.cuda.device_count()} GPUs; "
            "use one for each, or --device cpu"
        )
    return f"cuda:{local_rank()}"


def check_hardware(settings: TrainSettings, device: Any, dtype: str) -> None:
    """Refuses what cannot run on a device.

    Raises:
        ConfigError: with the setting.
    """
    if device.type != "cpu":
        return
    if dtype == "float16":
        raise ConfigError(
            "dtype: float16 gradients vanish on a CPU; use float32 or bfloat16, or a GPU"
        )
    if settings.liger:
        raise ConfigError("liger: liger-kernel's operators are written for GPUs; leave it out")


def _check_samples(settings: TrainSettings, data: RunData) -> None:
    rows = sample_rows(settings, data)
    if len(rows) < settings.sample_rows:
        raise ConfigError(
            f"sample_rows: {settings.sample_rows} asked for, and only {len(rows)} rows are chats "
            "(texts that are already templated have no question to ask)"
        )


def sample_rows(settings: TrainSettings, data: RunData) -> list[ChatRow]:
    """The rows whose last questions are answered before, during and after training: held-out ones
    where there are any."""
    rows = data.untrained_first().rows
    return [row for row in rows if row.text is None][: settings.sample_rows]
