"""Loading a base model: the only place that calls `from_pretrained` for weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from qlora_serve.base import gptq
from qlora_serve.base.identity import fingerprint, weight_files
from qlora_serve.base.memory import give_back
from qlora_serve.base.source import BaseSource, loading_reason, locate_base
from qlora_serve.base.templates import ChatTemplate, TemplateProcess
from qlora_serve.base.tokenizer import load_tokenizer, render_chat, stop_token_ids
from qlora_serve.errors import BaseModelError

Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory, with its tokenizer."""

    source: BaseSource
    model: Any
    """The transformers model, in evaluation mode."""
    tokenizer: Any
    quantization: str
    """How the weights in memory are quantized: `none`, `nf4`, `int8` or `gptq`."""
    dtype: str
    """What is computed in, such as `float32`."""
    templates: TemplateProcess | None = None
    """Renders its chat template within limits; None for in this process, without."""

    @cached_property
    def fingerprint(self) -> str:
        """See `identity.fingerprint`: of the files, whatever they are quantized to in memory."""
        return fingerprint(self.source)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """See `tokenizer.stop_token_ids`."""
        configs = self.model.generation_config, self.model.config
        return stop_token_ids(self.tokenizer, *configs, render=self.renderer(self.tokenizer))

    def renderer(self, tokenizer: Any) -> Callable[..., str]:
        """What writes chats with a tokenizer's template: `tokenizer.render_chat`, within limits
        where `templates` is given."""
        if self.templates is None:
            return partial(render_chat, tokenizer)
        return ChatTemplate(tokenizer, self.templates).render

    @property
    def device(self) -> Any:
        """The torch device that inputs go to."""
        return self.model.device  # of its first parameter


def load_base(
    name: str,
    quantization: Quantization = "none",
    dtype: DType = "auto",
    device: str = "auto",
    double_quantization: bool = True,
    trainable: bool = False,
    trust_remote_code: bool = False,
    templates: TemplateProcess | None = None,
) -> LoadedBase:
    """Loads a base model with its tokenizer.

    Args:
        name: a directory, a prepared name or a hub id.
        quantization: quantize while loading. A base whose files are already quantized needs none
            and keeps its own.
        dtype: what to compute in; `auto` is float32 on a CPU, else bfloat16 where the GPU has it
            and float16 where not.
        device: `auto` (the first GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        double_quantization: NF4 only, quantize the block scales too (QLoRA, arXiv:2305.14314).
        trainable: whether gradients are to flow through it, which not every GPTQ kernel for GPUs
            allows.
        trust_remote_code: run Python code that comes with it, where its architecture needs that.
        templates: see `LoadedBase.templates`.

    Raises:
        BaseModelError: the base does not exist, is broken, or contradicts `quantization`.
    """
    source = locate_base(name, trust_remote_code=trust_remote_code)
    weights = weight_files(source)
    stored = source.quantization
    if stored != "none" and quantization not in ("none", stored):
        raise BaseModelError(
            f"{name} is already quantized ({stored}); it cannot be loaded as {quantization}: "
            "leave --quantization out, or name the unquantized base"
        )
    in_memory = stored if stored != "none" else quantization
    tokenizer = load_tokenizer(source)
    torch_device = _device(device)
    torch_dtype = _torch_dtype(dtype, torch_device)
    settings = _quantization_settings(quantization, stored, torch_dtype, double_quantization)
    extra = {"quantization_config": settings} if settings is not None else {}
    if stored == "gptq":
        extra = {"config": gptq.loading_config(source, weights, torch_device, trainable)}
    model, info = _load_model(source, torch_dtype, torch_device, extra)
    if stored == "gptq":
        gptq.settle(model, info, source, weights)
    if quantization != "none" and stored == "none" and torch_device.type == "cpu":
        _let_go_of_files(model)
        give_back()
    model.eval()
    _keep_nf4_as_stored(model)
    name_of_dtype = str(torch_dtype).removeprefix("torch.")
    return LoadedBase(source, model, tokenizer, in_memory, name_of_dtype, templates)


def resolve(device: str, dtype: DType) -> tuple[Any, str]:
    """The torch device and the dtype's name that `load_base` would use.

    Raises:
        BaseModelError: there is no such device here.
    """
    torch_device = _device(device)
    return torch_device, str(_torch_dtype(dtype, torch_device)).removeprefix("torch.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' own progress bars, which would break into ours.

    So would DeepSpeed's warning that there is no GPU: transformers imports it, where it is
    installed, to save a model, and it goes to stdout, which belongs to a command's result.
    """
    from transformers.utils import logging as transformers_logging

    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.addFilter(_is_error)
    try:
        yield
    finally:
        deepspeed.removeFilter(_is_error)
        if was_shown:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _load_model(
    source: BaseSource, torch_dtype: Any, device: Any, extra: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says about the files' tensors and the model's."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    # ZeRO-3 splits each weight over the processes as it is read, and places the parts itself.
    if not is_deepspeed_zero3_enabled():
        extra = extra | {"device_map": {"": device}}
    quiet = gptq.silence() if source.quantization == "gptq" else nullcontext()
    try:
        with quiet_transformers(), quiet:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=torch_dtype,
                use_safetensors=True,
                output_loading_info=True,
                # Given in any case: left out, transformers asks on the terminal.
                trust_remote_code=source.trust_remote_code,
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = loading_reason(error, 300)
        raise BaseModelError(f"cannot load {source.path}: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers.
        raise BaseModelError(
            f"the weight files of {source.path} lack {len(missing)} of the model's tensors, "
            f"first {missing[0]}"
        )
    return model, info


def _let_go_of_files(model: Any) -> None:
    """Copies what was not quantized out of the mapped weight files, so that these go away.

    safetensors maps a file, and a tensor that stays as it is stored points into it. One of them,
    the embedding usually, keeps the whole file in memory: all layers unquantized, beside what was
    made of them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _keep_nf4_as_stored(model: Any) -> None:
    """Keeps bitsandbytes from repacking NF4 weights on the CPU.

    On CPUs with AVX-512 it does so, in place, at the first forward pass outside of training. That
    rounds the block scales to bfloat16, so that an adapter would be served and merged against
    another base than it was trained on, and it fails for widths that are no multiple of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _device(device: str) -> Any:
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"--device {device}: this torch sees no GPU; use cpu or auto")
    try:
        return torch.device(device)
    except RuntimeError:
        raise BaseModelError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None


def _torch_dtype(dtype: DType, device: Any) -> Any:
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def has_bfloat16(device: Any) -> bool:
    """Whether a device is a GPU that computes in bfloat16 itself; older ones emulate it, slowly."""
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _quantization_settings(
    quantization: Quantization, stored: str, torch_dtype: Any, double_quantization: bool
) -> Any:
    if quantization == "none" or stored != "none":
        return None
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise BaseModelError(
            f"--quantization {quantization} needs bitsandbytes: pip install 'qlora-serve[quant]'"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=torch_dtype,
    )
