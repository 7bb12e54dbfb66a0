"""Reading a GGUF file back, with transformers' own reader, and comparing its logits."""

from pathlib import Path
from typing import Any

import torch

from qlora_serve.base.load import load_base, quiet_transformers
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError
from qlora_serve.merge.config import GgufType
from qlora_serve.merge.proof import Comparison, Probes, ask, compare
from qlora_serve.progress import progress

# Allowed share of the logits' standard deviation. An 8-bit block keeps 7 bits of its largest value,
# as bfloat16 keeps 8 bits of each.
GGUF_TOLERANCES: dict[GgufType, float] = {"f32": 1e-3, "f16": 0.05, "bf16": 0.4, "q8_0": 0.4}

# Numbers that a GGUF file holds and transformers reads from it.
_SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def check_model(file: Path, source: BaseSource, kind: GgufType, probes: Probes) -> Comparison:
    """Compares a GGUF file with the model that it was made from, in float32.

    Raises:
        MergeError: a setting was lost, or the logits differ by more than the type's rounding.
    """
    base = load_base(str(source.path), dtype="float32", device="cpu")
    window = getattr(base.model.config, "sliding_window", None)
    if base.model.config.model_type == "mistral" and window:
        # Beyond it the GGUF, which has no window, announces no context either.
        probes = Probes([ids[-window:] for ids in probes.token_ids], probes.origin)
    expected = ask(base.model, probes, sorted(base.stop_token_ids), lambda done: None)
    config = base.model.config
    del base
    with progress("reading the GGUF again"):
        model = _load(file, config)
    got = ask(model, probes, [], lambda done: None)
    result = compare(expected, got)
    if not result.relative_difference <= GGUF_TOLERANCES[kind]:
        raise MergeError(
            f"{file.name} differs from the model by {result.relative_difference:.3g} standard "
            f"deviations of the logits, more than the {GGUF_TOLERANCES[kind]:g} that {kind} may; "
            "nothing was published"
        )
    return result


def _load(file: Path, config: Any) -> Any:
    """The model that a file describes, through transformers' names and reorderings."""
    import gguf
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = gguf.GGUFReader(file)
    architecture = reader.get_field("general.architecture").contents()
    _compare_settings(reader, architecture, config)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).float().eval()
    # transformers has no entry for the first Gemma; its norms are those of the second.
    key = "gemma2" if architecture == "gemma" else architecture
    processor = TENSOR_PROCESSORS.get(key, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor, model_type=architecture)
    state = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        processed = processor.process(values, tensor.name)
        state[names[tensor.name]] = torch.from_numpy(processed.weights.copy()).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = [] if not config.tie_word_embeddings else ["lm_head.weight"]
    if unexpected or [name for name in missing if name not in tied]:
        raise MergeError(f"{file.name} lacks {(list(missing) + list(unexpected))[0]}")
    model.tie_weights()
    return model


def _compare_settings(reader: Any, architecture: str, config: Any) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping = GGUF_CONFIG_MAPPING.get(architecture, GGUF_CONFIG_MAPPING["gemma2"])
    for key, name in mapping.items():
        field = reader.get_field(f"{architecture}.{key}")
        if field is None or name not in _SHARED:
            continue
        if field.contents() != getattr(config, name):
            raise MergeError(
                f"the GGUF says {key} {field.contents()}, the model {getattr(config, name)}"
            )
