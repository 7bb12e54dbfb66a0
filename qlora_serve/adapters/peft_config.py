"""Which settings of an adapter_config.json exist, and which of them can be applied exactly."""

from collections.abc import Mapping
from typing import Any

from qlora_serve.errors import AdapterError

# Settings that have done their work when training ends: none of them changes an answer.
_TRAINING_ONLY = frozenset(
    {
        "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "task_type", "lora_dropout", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "velora_config", "megatron_config", "megatron_core", "runtime_config",
        "init_lora_weights", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip

# Settings that PEFT resolves into ranks, scalings and module names, which we take from it.
_RESOLVED_BY_PEFT = frozenset(
    {
        "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora",
        "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    }
)  # fmt: skip

# Settings whose work is in the adapter's tensors, all of which the engine applies.
_APPLIED_FROM_TENSORS = frozenset(
    {"use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices"}
)

# These initialisations subtract the adapter's start from the base's weights, so that the saved
# tensors only fit the changed base, which is not what gets served.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def parse_config(config: Mapping[str, Any]) -> Any:
    """The PEFT `LoraConfig` of an adapter_config.json.

    PEFT itself drops keys that it does not know with a warning; here they are refused, since the
    adapter would then answer differently from what was trained.

    Raises:
        AdapterError: the method is not LoRA, or a setting is unknown to the installed PEFT.
    """
    import dataclasses

    import peft

    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type is {kind!r}; only LORA adapters can be applied")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    unknown = sorted(key for key in config if key not in known and config[key] not in _EMPTY)
    if unknown:
        raise AdapterError(
            f"adapter_config.json has settings that PEFT {peft.__version__} does not know: "
            f"{', '.join(unknown)}; it was made by another version"
        )
    try:
        return peft.LoraConfig(**{key: value for key, value in config.items() if key in known})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"PEFT refuses adapter_config.json: {error}") from None


_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


def unsupported_settings(config: Mapping[str, Any]) -> list[str]:
    """What an adapter asks for that the engine cannot apply exactly, in words; empty if nothing."""
    import dataclasses

    import peft

    reasons = []
    known = _TRAINING_ONLY | _RESOLVED_BY_PEFT | _APPLIED_FROM_TENSORS
    defaults = peft.LoraConfig()
    for field in dataclasses.fields(peft.LoraConfig):
        name = field.name
        if name in known or name not in config:
            continue
        value, default = config[name], getattr(defaults, name)
        if value != default and not (value in _EMPTY and default in _EMPTY):
            reasons.append(f"{name}={value!r}")
    start = base_changing_start(config)
    if start is not None:
        reasons.append(
            f"init_lora_weights={start!r}, which changes the base; save it converted to plain LoRA"
        )
    return reasons


def base_changing_start(config: Mapping[str, Any]) -> str | None:
    """The adapter's `init_lora_weights` when that has changed the base's own weights."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        return start
    return None


def answer_shaping_settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings that shape answers, in one canonical order, empty ones left out."""
    shaping = []
    for name in sorted(config):
        value = config[name]
        if name in _TRAINING_ONLY or value in _EMPTY:
            continue
        is_unordered = isinstance(value, list) and all(isinstance(item, str) for item in value)
        shaping.append((name, sorted(value) if is_unordered else value))
    return shaping
