"""DeepSpeed's configs: the shipped ones by name, or a file."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_serve.errors import ConfigError
from qlora_serve.train.config import TrainSettings

SHIPPED = ("zero2", "zero3", "zero2-offload", "zero3-offload")


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """The config that `--deepspeed` names, with `auto` for what our own settings decide.

    Raises:
        ConfigError: DeepSpeed is not installed, or the file cannot be used.
    """
    name = settings.deepspeed
    assert name is not None
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"--deepspeed {name} needs DeepSpeed: pip install 'qlora-serve[deepspeed]'"
        )
    is_shipped = name in SHIPPED
    file = Path(__file__).with_name(f"{name}.json") if is_shipped else Path(name).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--deepspeed {name}: no such file; expected one of {', '.join(SHIPPED)}, or a "
            "DeepSpeed config file"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or "zero_optimization" not in content:
        raise ConfigError(f"--deepspeed {name} has no zero_optimization, so it splits nothing")
    for key, ours in (("optimizer", "--optimizer"), ("scheduler", "--schedule")):
        if key in content:
            raise ConfigError(f"--deepspeed {name} sets the {key}; leave it to {ours}")
    return content


def zero_stage(settings: TrainSettings) -> int:
    """The ZeRO stage of a run; 0 without DeepSpeed."""
    if settings.deepspeed is None:
        return 0
    stage = deepspeed_config(settings)["zero_optimization"].get("stage", 0)
    return int(stage)


def check_stage(settings: TrainSettings, stored_quantization: str) -> None:
    """Refuses what ZeRO-3 cannot split.

    Raises:
        ConfigError: the base is quantized, or its start looks at whole weights.
    """
    if zero_stage(settings) < 3:
        return
    quantization = settings.quantization
    if stored_quantization != "none":
        quantization = stored_quantization  # type: ignore[assignment]
    if quantization != "none":
        raise ConfigError(
            f"--deepspeed {settings.deepspeed} splits the base's weights over processes, which "
            f"packed {quantization} weights do not allow; use zero2, or --quantization none"
        )
    if settings.add_tokens:
        raise ConfigError(
            f"add_tokens: --deepspeed {settings.deepspeed} splits the embeddings over processes, "
            "which cannot grow then; use zero2"
        )
    if settings.init not in ("default", "gaussian"):
        raise ConfigError(
            f"init: {settings.init} looks at whole weights, which --deepspeed "
            f"{settings.deepspeed} splits over processes; use zero2"
        )
