"""GPTQ checkpoints (arXiv:2210.17323): gptqmodel's own, and those in AutoGPTQ's format.

Both are loaded by gptqmodel through transformers. This module decides what the files mean, refuses
what would not be read exactly, and makes the loaded layers compute what the files say.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from qlora_serve.base.source import BaseSource
from qlora_serve.errors import BaseModelError

# The two layouts of zero points: less one, as AutoGPTQ wrote them, and as they are.
_FORMATS = ("gptq", "gptq_v2")
_BITS = (2, 3, 4, 8)
# Settings with which a checkpoint means something else than its layers' plain numbers.
_UNREAD = ("dynamic", "is_marlin_format", "rotation", "adapter")
_QUANTIZED_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def require_gptqmodel() -> None:
    """Raises:
    BaseModelError: gptqmodel or optimum is not installed.
    """
    missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if missing:
        raise BaseModelError(
            f"GPTQ needs {' and '.join(missing)}, not installed here: "
            "pip install 'qlora-serve[gptq]'"
        )


def loading_config(source: BaseSource, weights: list[Path], device: Any, trainable: bool) -> Any:
    """The transformers config that makes `from_pretrained` load a GPTQ checkpoint.

    Args:
        source: the base, whose files are GPTQ.
        weights: its weight files.
        device: the torch device it goes to.
        trainable: whether gradients are to flow through it.

    Raises:
        BaseModelError: the checkpoint cannot be read exactly, or gptqmodel is missing.
    """
    settings = _checked_settings(source)
    require_gptqmodel()
    _check_zero_points(source, settings, weights)
    import_gptqmodel()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
    # What gptqmodel takes on a CPU by itself rounds scales and inputs to bfloat16, in place, at the
    # first forward pass: the base would then be another one than adapters are trained on.
    backend = "gptq_torch" if device.type == "cpu" else "auto_trainable" if trainable else "auto"
    config.quantization_config = settings | {"backend": backend}
    if not (source.path / "model.safetensors").is_file() and len(weights) == 1:
        config.transformers_weights = weights[0].name  # such as gptq_model-4bit-128g.safetensors
    return config


def settle(model: Any, info: dict[str, Any], source: BaseSource, weights: list[Path]) -> None:
    """Checks a model that was just loaded, and lets it compute exactly what its files hold.

    Raises:
        BaseModelError: the files hold quantized layers that the model does not have.
    """
    unread = sorted(info["unexpected_keys"])
    lost = [name for name in unread if name.endswith(_QUANTIZED_PARTS)]
    lost += [name for name in unread if name.endswith(".bias") and _is_alive(name, weights)]
    if lost:
        raise BaseModelError(
            f"{source.path} holds {lost[0]}, which the GPTQ loader does not read (a quantized "
            "output layer, say), so the model would not be the one in the files"
        )
    settle_layers(model)


def settle_layers(model: Any) -> None:
    """Lets the GPTQ layers on the CPU compute exactly what they hold."""
    for module in model.modules():
        if is_gptq(module) and module.qweight.device.type == "cpu":
            # Scales are float16 in the files; a product with them would be rounded to float16.
            module.scales = module.scales.float()
            # torch.compile, which takes minutes for all layers and changes no number.
            vars(module).pop("dequantize_weight", None)


def is_gptq(module: Any) -> bool:
    """Whether a module is a layer of gptqmodel's."""
    return hasattr(module, "qweight") and hasattr(module, "dequantize_weight")


def import_gptqmodel() -> None:
    """Imports gptqmodel without its banner, and undoes what importing it does to the process.

    It redirects the hub's cache to a temporary folder for this and every child process, and takes
    over the root logger.
    """
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with silence(), redirect_stdout(StringIO()):
        from logbar import LogBar

        LogBar.shared().setLevel(logging.CRITICAL)
        import gptqmodel  # noqa: F401
    for name in ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE"):
        os.environ.pop(name, None)
        if name in environment:
            os.environ[name] = environment[name]
    root.handlers[:], root.level = handlers, level


@cache
def before_peft() -> None:
    """Imports gptqmodel, if it is installed, before PEFT does so at the first layer that it wraps.

    PEFT asks of every layer of every base whether it is one of gptqmodel's, and imports it for
    that with all that `import_gptqmodel` undoes.
    """
    if find_spec("gptqmodel") is None:
        return
    with suppress(ImportError):  # a version that does not fit: PEFT says so better
        import_gptqmodel()


_ASKING = threading.Lock()


@contextmanager
def no_gptq_layers() -> Iterator[None]:
    """Keeps PEFT from importing gptqmodel while it wraps a model that has none of its layers.

    It imports it for each such question, and with it datasets, pandas and pyarrow: memory that a
    server without a GPTQ base does not need (docs/performance.md).
    """
    name = "is_gptqmodel_available"
    with _ASKING:  # two threads at once would take each other's answer for PEFT's own
        asking = [one for key, one in list(sys.modules.items()) if key.startswith("peft.")]
        held = [(one, vars(one)[name]) for one in asking if name in vars(one)]
        for module, _ in held:
            setattr(module, name, lambda: False)
        try:
            yield
        finally:
            for module, original in held:
                setattr(module, name, original)


@contextmanager
def silence() -> Iterator[None]:
    """Hides warnings of libraries that say nothing about the user's model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _checked_settings(source: BaseSource) -> dict[str, Any]:
    """The settings that shape numbers, under the names that transformers knows.

    Raises:
        BaseModelError: with the setting that cannot be read exactly.
    """
    stored = source.quantization_settings
    layout = str(stored.get("checkpoint_format") or stored.get("format") or "gptq").lower()
    bits, group_size = stored.get("bits"), stored.get("group_size", 128)
    reason = None
    if layout not in _FORMATS:
        reason = f"its format is {layout!r}, expected one of {', '.join(_FORMATS)}"
    elif bits not in _BITS:
        reason = f"it has {bits!r} bits, expected one of {', '.join(map(str, _BITS))}"
    elif not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        reason = f"its group_size is {group_size!r}, expected -1 or a positive number"
    elif stored.get("pack_dtype", "int32") != "int32":
        reason = f"it is packed into {stored['pack_dtype']}, expected int32"
    else:
        meta = stored.get("meta") or {}
        unread = [name for name in _UNREAD if stored.get(name) or meta.get(name)]
        if unread:
            reason = f"{unread[0]}={(stored.get(unread[0]) or meta[unread[0]])!r} is not read"
    if reason is not None:
        raise BaseModelError(
            f"{source.path} is a GPTQ model that cannot be loaded exactly: {reason}"
        )
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": bool(stored.get("desc_act", False)),
        "sym": bool(stored.get("sym", True)),
        "format": layout,
        "block_name_to_quantize": stored.get("block_name_to_quantize"),
        "modules_in_block_to_quantize": stored.get("modules_in_block_to_quantize"),
    }


def _check_zero_points(source: BaseSource, settings: dict[str, Any], weights: list[Path]) -> None:
    """Checks that zero points which are stored less one can be told apart.

    AutoGPTQ stored each code less one in its own bits, so that zero becomes the largest code, as
    does one past the largest; readers disagree on which it is, and gptqmodel carries into the
    neighbour. gptqmodel itself takes one off the whole packed word, which can be undone.

    Raises:
        BaseModelError: with the first layer that holds such a zero point.
    """
    written_by = str((source.quantization_settings.get("meta") or {}).get("quantizer"))
    if settings["format"] != "gptq" or "gptqmodel" in written_by:
        return
    bits, largest = settings["bits"], 2 ** settings["bits"] - 1
    if bits == 3:  # codes that span words
        if settings["sym"]:
            return
        raise BaseModelError(
            f"{source.path} is a GPTQ model of 3 bits with zero points in AutoGPTQ's format, which "
            "cannot be read exactly; use another version of the model"
        )
    from safetensors import safe_open

    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not name.endswith(".qzeros"):
                    continue
                packed = tensors.get_tensor(name)
                if any(
                    bool(((packed >> s) & largest == largest).any()) for s in range(0, 32, bits)
                ):
                    raise BaseModelError(
                        f"{source.path}: {name} holds the zero point {largest} less one, which "
                        "AutoGPTQ's format cannot tell from another; use a version of the model "
                        "with sym=true or in the format gptq_v2"
                    )


def _is_alive(name: str, weights: list[Path]) -> bool:
    """Whether a tensor of the files is anything but zeros: AutoGPTQ gave every layer a bias."""
    from safetensors import safe_open

    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - not a dict
                return bool(tensors.get_tensor(name).any())
    return False
