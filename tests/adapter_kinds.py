"""Every kind of adapter, by the names that a family gives its layers."""

from typing import Any


def adapter_kinds(family: str) -> dict[str, dict[str, Any]]:
    """Name → settings of `write_random_adapter`, for a family of `tiny_models`."""
    fused = family == "phi3"
    few = ["qkv_proj"] if fused else ["q_proj", "v_proj"]
    layer = "gate_up_proj" if fused else "k_proj"
    inner = "self_attn.qkv_proj" if fused else "self_attn.q_proj"
    # "norm" would also mean the norms of each head that some families have, which are refused.
    norms = ["layernorm"] if family in ("qwen3", "gemma3") else ["norm", "layernorm"]
    return {
        "lora": {},
        "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 4},
        "patterns": {
            "rank_pattern": {"down_proj": 2, "fc2": 2, f"layers.1.{inner}": 7},
            "alpha_pattern": {"o_proj": 3, "dense": 3},
        },
        "some-targets": {"target_modules": few, "r": 40},
        "some-layers": {"target_modules": few, "layers_to_transform": [0, 2]},
        "dora": {"use_dora": True},
        "dora-rslora-bias": {"use_dora": True, "use_rslora": True, "bias": "all", "lora_alpha": 3},
        "bias-all": {"bias": "all", "target_modules": few},
        "bias-lora-only": {"bias": "lora_only", "target_modules": few},
        "lora-bias": {"lora_bias": True},
        "saved": {
            "modules_to_save": ["embed_tokens", "lm_head", *norms],
            "target_modules": few,
        },
        "saved-embedding": {"modules_to_save": ["embed_tokens"], "target_modules": few},
        "saved-embedding-tied": {
            "modules_to_save": ["embed_tokens"],
            "target_modules": few,
            "ensure_weight_tying": True,
        },
        "saved-output": {"modules_to_save": ["lm_head"], "target_modules": few, "bias": "all"},
        "saved-linear": {
            "modules_to_save": [layer],
            "target_modules": few[:1] if not fused else ["o_proj"],
        },
        "embedding": {"target_modules": ["embed_tokens", "lm_head", few[0]]},
        "embedding-tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        "embedding-dora": {"target_modules": ["embed_tokens", few[-1]], "use_dora": True},
        "tokens": {
            "trainable_token_indices": [10, 11, 3, 12, *range(100, 300)],
            "target_modules": few,
        },
        "enlarged": {"vocabulary": 520, "target_modules": few},
        "enlarged-embedding-dora": {
            "vocabulary": 528,
            "target_modules": ["embed_tokens", "lm_head", few[0]],
            "use_dora": True,
        },
    }
