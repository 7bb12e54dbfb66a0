"""Tiny random models of several families, written as ordinary model directories.

Each has the real architecture of its family in a width that a test can afford, a byte-level BPE
tokenizer trained in the test, and a ChatML template, so that every path (masks, serving, merging)
runs as it does on a real checkpoint.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,  # bitsandbytes on a CPU wants multiples of 64
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # A larger spread than the default 0.02, so that random logits differ by more than rounding.
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=24),
    "gemma": lambda: GemmaConfig(**_COMMON, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, head_dim=16, sliding_window=24, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        sliding_window_pattern=2,
    ),
    "phi": lambda: PhiConfig(**_COMMON, partial_rotary_factor=0.5),
    "phi3": lambda: Phi3Config(**_COMMON),
}

_CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "system user assistant question answer hello world",
    "Order 4711 arrived broken, please refund the invoice today!",
    '{"category": "billing", "urgency": "high"} sport=0 money=2 health=1',
    "Grüße aus Köln, 你好世界, emoji 🙂🚀 and tabs\tand\nnewlines",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A copy for each caller, since some change its template."""
    return copy.deepcopy(_tiny_tokenizer())


@cache
def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_COMMON["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def write_tiny_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Writes a tiny random model of a family, in float32, and returns its directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    # Biases and norms start at 0 and 1, which would hide a path that forgets them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2, bos_token_id=0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_random_adapter(
    folder: Path, base: Path, seed: int = 1, vocabulary: int | None = None, **settings: Any
) -> Path:
    """Writes a PEFT adapter with random, non-zero weights for a base, by PEFT itself.

    Args:
        folder: where to write it.
        base: the directory of its base.
        seed: of its weights.
        vocabulary: the tokens that the base's embeddings are resized to first.
        settings: of `peft.LoraConfig`; by default rank 4, alpha 8 on all linear layers.
    """
    from peft import LoraConfig, get_peft_model

    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    peft_model = get_peft_model(model, LoraConfig(**(chosen | settings)))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peft_model.save_pretrained(folder)
    # PEFT writes its base's path; keep the file readable for people.
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder
