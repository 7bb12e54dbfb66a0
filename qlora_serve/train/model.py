"""The model that is trained: a frozen base with LoRA layers."""

import re
import warnings
from typing import Any

import torch

from qlora_serve.base.load import LoadedBase
from qlora_serve.errors import BaseModelError, ConfigError
from qlora_serve.train.config import ALL_LINEAR, TrainSettings

TRAINABLE_QUANTIZATIONS = ("none", "nf4", "int8", "gptq")
_LISTED = 12


def add_lora(base: LoadedBase, settings: TrainSettings, base_name: str) -> Any:
    """Puts fresh LoRA layers on a base, of which only they are trained, in float32.

    The random generator must have been seeded. The base is changed in place.

    Args:
        base: the loaded base.
        settings: of the run.
        base_name: what adapter_config.json calls the base.

    Raises:
        BaseModelError: bases quantized like this one cannot be trained on.
        ConfigError: a target module does not exist.
    """
    from peft import LoraConfig, get_peft_model

    if base.quantization not in TRAINABLE_QUANTIZATIONS:
        raise BaseModelError(
            f"{base.source.name} is quantized with {base.quantization}, which cannot be trained "
            f"on; expected one of: {', '.join(TRAINABLE_QUANTIZATIONS)}"
        )
    targets = settings.target_modules
    _check_targets(base.model, targets)
    _prepare(base, settings.gradient_checkpointing)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied embeddings: `merge` deals with them
            model: Any = get_peft_model(base.model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"target_modules {_shown(targets)} cannot be used: {reason}") from None
    # PEFT writes the path of the loaded files, which says little about a hub model.
    model.peft_config["default"].base_model_name_or_path = base_name
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


def _prepare(base: LoadedBase, gradient_checkpointing: bool) -> None:
    options = {"use_reentrant": False}
    if base.quantization == "none":
        if gradient_checkpointing:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(
        base.model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs=options,
    )


def _check_targets(model: Any, targets: str | tuple[str, ...]) -> None:
    if targets == ALL_LINEAR:
        return
    paths = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        wrong = [] if any(re.fullmatch(targets, path) for path in paths) else [targets]
    else:
        wrong = [
            name
            for name in targets
            if not any(path == name or path.endswith(f".{name}") for path in paths)
        ]
    if wrong:
        known = sorted({path.rpartition(".")[2] for path in _linear_paths(model)})
        raise ConfigError(
            f"target_modules {_shown(tuple(wrong))} match nothing in this base; its linear layers "
            f"are: {', '.join(known[:_LISTED])}"
        )


def _linear_paths(model: Any) -> list[str]:
    # Quantized layers have classes of their own, all called something with Linear.
    return [name for name, module in model.named_modules() if "Linear" in type(module).__name__]


def _shown(targets: str | tuple[str, ...]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(map(repr, targets))
