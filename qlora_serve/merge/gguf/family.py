"""What llama.cpp calls each family's parts, and how it wants their tensors."""

from dataclasses import dataclass
from typing import Any

import torch

from qlora_serve.errors import MergeError

# transformers' model_type → llama.cpp's architecture.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_GEMMA2_27B_LAYERS = 46


@dataclass(frozen=True)
class Family:
    """One architecture in llama.cpp's terms."""

    architecture: str
    config: Any
    """The transformers config."""

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter.

        Raises:
            MergeError: it has none.
        """
        found: str | None = self._names().get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise MergeError(f"GGUF has no name for {parameter} in {self.architecture}")
        return found

    def convert(self, parameter: str, tensor: Any) -> Any:
        """A parameter as llama.cpp wants it: its rows in another order, or its norms plus one."""
        if self.architecture == "llama":
            heads = self._rotated_heads(parameter)
            return tensor if heads is None else interleave_rows(tensor, heads)
        if self.architecture.startswith("gemma") and parameter.endswith("norm.weight"):
            return tensor + 1  # the model computes x * (1 + weight)
        return tensor

    def _rotated_heads(self, parameter: str) -> int | None:
        path = parameter.rpartition(".")[0]
        if path.endswith("q_proj"):
            return int(self.config.num_attention_heads)
        if path.endswith("k_proj"):
            return int(self.config.num_key_value_heads)
        return None

    def _names(self) -> Any:
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)


def interleave_rows(tensor: Any, heads: int) -> Any:
    """Reorders the rows of a query or key projection [heads * width, ...].

    transformers rotates the two halves of a head against each other, llama.cpp (in its llama
    architecture) neighbouring pairs.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def find_family(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        MergeError: there is no export for it, or its settings have no place in GGUF.
    """
    kind = str(config.model_type)
    architecture = _ARCHITECTURES.get(kind)
    if architecture is None:
        raise MergeError(
            f"there is no GGUF export for {kind}; expected one of {', '.join(_ARCHITECTURES)}"
        )
    _refuse_settings(kind, config)
    return Family(architecture, config)


def write_settings(writer: Any, family: Family) -> None:
    """Writes the architecture's numbers.

    Raises:
        MergeError: the way of scaling positions is unknown to llama.cpp.
    """
    config = family.config
    head_width = _head_width(config)
    context = config.max_position_embeddings
    if config.model_type == "mistral" and config.sliding_window:
        # llama.cpp's llama architecture attends to everything; within the window that is the same.
        context = min(context, config.sliding_window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family.architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _write_rope(writer, family)


def rope_factors(config: Any) -> Any:
    """Llama 3's divisors of the rotation frequencies, [head width / 2]; else None."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width, theta = _head_width(config), float(rope["rope_theta"])
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    length = 2 * torch.pi / plain
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    old = float(rope["original_max_position_embeddings"])
    smooth = (old / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(length > old / low, factor, between)
    return torch.where(length < old / high, 1.0, divisors).float()


def _write_rope(writer: Any, family: Family) -> None:
    import gguf

    rope = _rope(family.config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    # Gemma 3 has one for its full and one for its local layers; llama.cpp knows the local one.
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _refuse_settings(kind: str, config: Any) -> None:
    problems = []
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        problems.append(f"rope_type {rope_type!r}")
    if rope_type == "llama3" and kind not in ("llama", "mistral"):
        problems.append(f"rope_type {rope_type!r} in {kind}")
    if kind.startswith("qwen") and getattr(config, "use_sliding_window", False):
        problems.append("use_sliding_window")
    if getattr(config, "mlp_bias", False):
        problems.append("mlp_bias")
    if kind in ("gemma2", "gemma3_text"):
        scalar, width = float(config.query_pre_attn_scalar), _head_width(config)
        if kind == "gemma2" and config.num_hidden_layers == _GEMMA2_27B_LAYERS:
            width = config.hidden_size // config.num_attention_heads
        if scalar != width:
            problems.append(f"query_pre_attn_scalar {scalar:g} with heads of {width}")
    local = dict(config.rope_parameters).get("sliding_attention")
    if local is not None and float(local["rope_theta"]) != 10000.0:
        problems.append(f"a local rope_theta of {local['rope_theta']}")
    if problems:
        raise MergeError(f"llama.cpp cannot compute {' and '.join(problems)} as this {kind} does")
