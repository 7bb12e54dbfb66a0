"""Identity is content: an adapter is known by a hash of its weights and config."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.peft_config import answer_shaping_settings


def content_identity(adapter: AdapterFiles, tensors: Mapping[str, Any] | None = None) -> str:
    """`sha256:...` over the settings that shape answers, the base, and every tensor.

    The order of tensors in the file and settings that only matter in training (dropout, the way
    of initialising) do not change it; a scale, a target, a weight or another base does.

    Args:
        adapter: the directory.
        tensors: its tensors, when the caller has already loaded them.
    """
    manifest = adapter.manifest
    base = manifest.base.fingerprint if manifest is not None else adapter.base_name
    digest = hashlib.sha256()
    digest.update(json.dumps([base, answer_shaping_settings(adapter.config)]).encode())
    loaded = tensors if tensors is not None else adapter.load_tensors()
    for name in sorted(loaded):
        tensor = loaded[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw_bytes(tensor))
    return "sha256:" + digest.hexdigest()


def _raw_bytes(tensor: Any) -> memoryview:
    import torch

    # numpy has no bfloat16: look at any dtype as bytes.
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
