"""A quantized copy of a merged model, and what quantizing costs it."""

import gc
from importlib.util import find_spec
from typing import Any

from qlora_serve.base.gptq import require_gptqmodel
from qlora_serve.base.load import load_base
from qlora_serve.base.prepare import prepare_base
from qlora_serve.base.quantize_gptq import GptqSettings
from qlora_serve.errors import MergeError
from qlora_serve.files import require_free_output
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.proof import Comparison, Probes, ask, compare, follow
from qlora_serve.progress import console, progress


def require_quantizer(settings: MergeSettings) -> None:
    """Checks, before anything is merged, that the copy can be made.

    Raises:
        BaseModelError: gptqmodel is not installed.
        ConfigError: a GPTQ setting cannot be.
        MergeError: bitsandbytes is not installed.
        OutputError: the copy's directory holds something.
    """
    if settings.quantize == "none":
        return
    require_free_output(settings.quantized_output)
    if settings.quantize == "nf4" and find_spec("bitsandbytes") is None:
        raise MergeError("--quantize nf4 needs bitsandbytes: pip install 'qlora-serve[quant]'")
    if settings.quantize == "gptq":
        require_gptqmodel()
        _gptq_settings(settings)


def quantize_merged(settings: MergeSettings, probes: Probes, stops: list[int]) -> Comparison:
    """Writes the quantized copy of a published merge and compares the two on the probes.

    The difference is the quantization's, and decides nothing: the merged model is proven, and the
    copy lies beside it.
    """
    assert settings.quantize != "none"
    prepare_base(
        str(settings.output),
        settings.quantized_output,
        settings.quantize,
        console.print,
        _gptq_settings(settings),
    )
    gc.collect()
    with progress("asking the merged model", total=len(probes.token_ids)) as bar:
        merged = ask(_load(settings.output, settings), probes, stops, bar.update)
    gc.collect()
    with progress("asking the quantized copy", total=len(probes.token_ids)) as bar:
        model = _load(settings.quantized_output, settings)
        copy = follow(model, probes, merged.greedy, bar.update)
    return compare(merged, copy)


def _load(folder: Any, settings: MergeSettings) -> Any:
    return load_base(str(folder), dtype="float32", device=settings.device).model


def _gptq_settings(settings: MergeSettings) -> GptqSettings:
    flags = {
        "bits": settings.gptq_bits,
        "group_size": settings.gptq_group_size,
        "calibration": settings.calibration,
    }
    chosen: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    return GptqSettings(**chosen)
