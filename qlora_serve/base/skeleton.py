"""A base model's modules and shapes, without its weights."""

from typing import Any

from qlora_serve.base.source import BaseSource, loading_reason
from qlora_serve.errors import BaseModelError


def build_skeleton(source: BaseSource, vocabulary: int | None = None) -> Any:
    """The transformers model of a base on the meta device: every module and shape, no memory.

    A quantized base gives the shapes of its unquantized form, which is what adapters fit onto.

    Args:
        source: the base.
        vocabulary: the rows of its embeddings, where they are to be others than the base's own.

    Raises:
        BaseModelError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if vocabulary is not None:
            config.get_text_config().vocab_size = vocabulary
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=source.trust_remote_code
            )
    except (ValueError, KeyError, OSError) as error:
        reason = loading_reason(error, 200)
        raise BaseModelError(f"cannot build the model of {source.path}: {reason}") from None
    return model
