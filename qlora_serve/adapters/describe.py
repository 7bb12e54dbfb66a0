"""An adapter in a few words and numbers, for people and scripts."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import MANIFEST_FILE
from qlora_serve.adapters.weights import AdapterWeights
from qlora_serve.errors import AdapterError, ConfigError

_MARKS = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "adapter_model.bin")
_LAYER = re.compile(r"\.(\d+)\.")


def describe(adapter: AdapterFiles) -> dict[str, Any]:
    """What an adapter is, as `adapters list --json` prints it.

    Raises:
        AdapterError: its weights cannot be read.
    """
    return {
        "name": adapter.path.name,
        "path": str(adapter.path),
        "kind": kind_of(adapter.config),
        "rank": ranks_of(adapter.config),
        "target_modules": targets_of(adapter.config),
        "size_bytes": adapter.size_bytes,
        "base": adapter.base_name,
        "identity": content_identity(adapter),
    }


def describe_folder(folder: Path) -> list[dict[str, Any]]:
    """Every adapter in a folder, described; a broken one has `error` in place of the rest.

    Raises:
        ConfigError: the folder is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder of adapters at {folder}")
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir()):
        # Hidden directories are adapters that are still being written.
        if path.name.startswith(".") or not any((path / mark).exists() for mark in _MARKS):
            continue
        try:
            rows.append(describe(read_adapter(path)))
        except AdapterError as error:
            rows.append({"name": path.name, "path": str(path), "error": str(error)})
    return rows


def kind_of(config: Mapping[str, Any]) -> str:
    """The method in the field's words, such as `LoRA` or `rsLoRA + DoRA + lm_head`."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    parts = ["rsLoRA"] if config.get("use_rslora") else []
    parts += ["DoRA"] if config.get("use_dora") else []
    parts = parts or ["LoRA"]
    if config.get("bias") not in (None, "none"):
        parts.append("bias")
    return " + ".join([*parts, *(config.get("modules_to_save") or [])])


def ranks_of(config: Mapping[str, Any]) -> str:
    """The rank, or the smallest and largest where they differ per module."""
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()} - {None}
    if not ranks:
        return "?"
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def targets_of(config: Mapping[str, Any]) -> list[str]:
    """The target modules, sorted; a pattern stands alone."""
    targets = config.get("target_modules") or []
    return [targets] if isinstance(targets, str) else sorted(targets)


def layer_norms(weights: AdapterWeights) -> dict[str, float]:
    """Layer → Frobenius norm of all its updates `scaling * B A`.

    Without building the [out, in] product: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, both [rank, rank]. A layer far
    from the others, or one at 0, shows where training went wrong.
    """
    squares: dict[str, float] = defaultdict(float)
    for name, pair in weights.modules.items():
        a, b = pair.a.double(), pair.b.double()
        square = float(((b.T @ b) * (a @ a.T)).sum()) * pair.scaling**2
        found = _LAYER.search(f".{name}.")
        squares[found[1] if found else name] += max(0.0, square)
    return {layer: math.sqrt(square) for layer, square in squares.items()}
