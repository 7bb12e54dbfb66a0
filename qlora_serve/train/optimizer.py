"""The optimizers by their names here, and in transformers."""

from importlib.util import find_spec
from typing import Any

from qlora_serve.errors import ConfigError
from qlora_serve.train.config import TrainSettings

_NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion-8bit": "lion_8bit",
    "sgd": "sgd",
}


def transformers_name(settings: TrainSettings, on_gpu: bool) -> str:
    """What transformers calls the chosen optimizer.

    Raises:
        ConfigError: it needs a GPU, or a package that is missing.
    """
    name = settings.optimizer
    if "8bit" in name or "paged" in name:
        if "paged" in name and not on_gpu:
            raise ConfigError(
                f"optimizer: {name} moves its state between GPU and CPU, and there is no GPU; "
                f"use {name.removeprefix('paged-')}"
            )
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"optimizer: {name} needs bitsandbytes: pip install 'qlora-serve[quant]'"
            )
    return _NAMES[name]


def loraplus_optimizer(model: Any, optimizer: type, options: dict[str, Any], ratio: float) -> Any:
    """LoRA+: the B matrices learn `ratio` times faster than the A matrices (arXiv:2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model=model, optimizer_cls=optimizer, loraplus_lr_ratio=ratio, **options
    )
