"""Writing an adapter that was computed instead of trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import Manifest, write_manifest
from qlora_serve.adapters.weights import LoraPair, load_weights
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class NewAdapter:
    """An adapter in memory."""

    pairs: Mapping[str, LoraPair]
    """Module → its update; every scaling is 1."""
    manifest: Manifest
    others: Mapping[str, Any] = field(default_factory=dict)
    """Further tensors under PEFT's names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of adapter_config.json."""


def write_adapter(folder: Path, adapter: NewAdapter, source: BaseSource) -> str:
    """Writes a PEFT directory, reads it back as the server would, and returns its identity.

    Raises:
        AdapterError: what was written does not load on the base.
        MergeError: it loads as something else than what was to be written.
    """
    from safetensors.torch import save_file

    tensors = dict(adapter.others)
    for path, pair in adapter.pairs.items():
        tensors |= _tensors(path, pair)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS_FILE)
    config = _config(adapter, source)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_manifest(folder, adapter.manifest)
    files = read_adapter(folder)
    loaded = load_weights(files, FitChecker(source))
    for path, pair in adapter.pairs.items():
        found = loaded.modules.get(path)
        if found is None or found.scaling != 1.0 or not found.b.equal(pair.b):
            raise MergeError(f"the written adapter does not hold the update of {path}")
    return content_identity(files)


def _tensors(path: str, pair: LoraPair) -> dict[str, Any]:
    stem = f"{_PREFIX}{path}"
    if pair.is_embedding:
        named = {f"{stem}.lora_embedding_A": pair.a, f"{stem}.lora_embedding_B": pair.b}
    else:
        named = {f"{stem}.lora_A.weight": pair.a, f"{stem}.lora_B.weight": pair.b}
    if pair.magnitude is not None:
        named[f"{stem}.lora_magnitude_vector"] = pair.magnitude
    if pair.b_bias is not None:
        named[f"{stem}.lora_B.bias"] = pair.b_bias
    return named


def _config(adapter: NewAdapter, source: BaseSource) -> dict[str, Any]:
    ranks = {path: int(pair.a.shape[0]) for path, pair in adapter.pairs.items()}
    rank = max(ranks.values(), default=1)
    # Alpha equal to the rank is a scaling of 1, for every module.
    others = {path: own for path, own in sorted(ranks.items()) if own != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.manifest.base.name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(set(ranks), source),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    return config | dict(adapter.settings)


def _targets(paths: set[str], source: BaseSource) -> list[str]:
    """The modules' last names where these mean no other module, else their whole paths."""
    leaves = {path.rpartition(".")[2] for path in paths}
    same = {
        name
        for name, _ in build_skeleton(source).named_modules()
        if name.rpartition(".")[2] in leaves
    }
    return sorted(leaves) if same == paths else sorted(paths)
