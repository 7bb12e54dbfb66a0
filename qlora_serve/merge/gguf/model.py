"""Writing a model directory as one GGUF file, tensor by tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.base.tokenizer import load_tokenizer
from qlora_serve.errors import MergeError
from qlora_serve.merge.config import GgufType
from qlora_serve.merge.gguf.family import Family, find_family, rope_factors, write_settings
from qlora_serve.merge.gguf.vocabulary import write_vocabulary
from qlora_serve.merge.stream import why_not_streamable
from qlora_serve.merge.tensor_files import StoredTensor, stored_tensors

OnTensor = Callable[[int], None]


def write_model(
    file: Path, source: BaseSource, kind: GgufType, title: str, on_tensor: OnTensor
) -> None:
    """Writes an unquantized model as GGUF.

    Raises:
        MergeError: llama.cpp does not know the architecture, one of its settings, or the tokenizer.
    """
    import gguf

    skeleton = build_skeleton(source)
    family = find_family(skeleton.config)
    reason = why_not_streamable(source)
    if reason is not None:
        raise MergeError(f"{source.path} cannot be written as GGUF: {reason}")
    stored = {
        name: tensor
        for name, tensor in stored_tensors(source).items()
        if name in skeleton.state_dict()
    }
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_settings(writer, family)
    write_vocabulary(
        writer, load_tokenizer(source), skeleton.get_input_embeddings().weight.shape[0]
    )
    factors = rope_factors(skeleton.config)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "f32")
    for name, tensor in stored.items():
        _announce(writer, family.name(name), tensor.shape, stored_as(name, tensor.shape, kind))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for done, (name, tensor) in enumerate(stored.items(), start=1):
        writer.write_tensor_data(_encoded(family, name, tensor, kind))
        on_tensor(done)
    writer.close()


def stored_as(name: str, shape: tuple[int, ...], kind: GgufType) -> GgufType:
    """What one tensor is stored in: norms and biases stay float32, narrow rows stay 16 bits."""
    import gguf

    if len(shape) < 2 or name.endswith("norm.weight"):
        return "f32"
    block = gguf.GGML_QUANT_SIZES[quantization(kind)][0]
    return kind if shape[-1] % block == 0 else "f16"


def quantization(kind: GgufType) -> Any:
    """gguf's own constant."""
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def encode(tensor: Any, kind: GgufType) -> Any:
    """A float32 tensor in the numpy form that gguf writes.

    Raises:
        MergeError: a value does not fit.
    """
    from gguf.quants import quantize

    encoded = quantize(tensor.contiguous().numpy(), quantization(kind))
    if kind == "f16" and not bool(torch.from_numpy(encoded).isfinite().all()):
        raise MergeError("a weight does not fit into f16; use --gguf bf16 or f32")
    return encoded


def _encoded(family: Family, name: str, tensor: StoredTensor, kind: GgufType) -> Any:
    values = family.convert(name, tensor.whole().float())
    return encode(values, stored_as(name, tensor.shape, kind))


def _announce(writer: Any, name: str, shape: Any, kind: GgufType) -> None:
    """Enters a tensor in the file's table, before any is written."""
    import gguf
    import numpy as np

    shape, dtype = tuple(shape), {"f32": np.float32, "f16": np.float16}.get(kind, np.uint8)
    raw = quantization(kind)
    if dtype is np.uint8:
        shape = gguf.quant_shape_to_byte_shape(shape, raw)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    writer.add_tensor_info(name, shape, np.dtype(dtype), size, raw)


def _file_type(kind: GgufType) -> Any:
    import gguf

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return gguf.LlamaFileType[name]
