"""Writing an adapter as GGUF, in llama.cpp's LoRA format."""

from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import AdapterWeights, load_weights
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError
from qlora_serve.merge.config import GgufType
from qlora_serve.merge.gguf.family import find_family
from qlora_serve.merge.gguf.model import encode, stored_as


def write_adapter(file: Path, adapter: AdapterFiles, source: BaseSource, kind: GgufType) -> None:
    """Writes a LoRA adapter as GGUF.

    llama.cpp scales every update by one alpha over that update's own rank. Scalings that differ
    (rsLoRA, patterns) are therefore put into B.

    Raises:
        AdapterError: the adapter does not fit its base.
        MergeError: it is more than low-rank updates of linear layers.
    """
    import gguf

    weights = load_weights(adapter, FitChecker(source))
    _require_lora(adapter, weights)
    family = find_family(build_skeleton(source).config)
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = float(weights.max_rank)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(adapter.path.name)
    for path, pair in weights.modules.items():
        name = family.name(f"{path}.weight")
        rank = pair.a.shape[0]
        b = pair.b.float() * (pair.scaling * rank / alpha)
        # A reordering of the layer's outputs is one of the rows of B.
        _add(writer, f"{name}.lora_a", pair.a.float(), kind)
        _add(writer, f"{name}.lora_b", family.convert(f"{path}.weight", b), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, tensor: Any, kind: GgufType) -> None:
    from qlora_serve.merge.gguf.model import quantization

    used = stored_as(name, tuple(tensor.shape), kind)
    writer.add_tensor(name, encode(tensor, used), raw_dtype=quantization(used))


def _require_lora(adapter: AdapterFiles, weights: AdapterWeights) -> None:
    pairs = weights.modules.values()
    found = [
        ("DoRA's magnitudes", any(pair.magnitude is not None for pair in pairs)),
        ("a bias of B (lora_bias)", any(pair.b_bias is not None for pair in pairs)),
        ("an update of the embeddings", any(pair.is_embedding for pair in pairs)),
        ("biases", bool(weights.biases)),
        ("replaced modules (modules_to_save)", bool(weights.replaced)),
        ("trained tokens", bool(weights.token_rows)),
    ]
    names = [name for name, is_there in found if is_there]
    if names:
        raise MergeError(
            f"adapter {adapter.path} holds {' and '.join(names)}, which llama.cpp's adapters "
            "cannot; merge it and export the model"
        )
