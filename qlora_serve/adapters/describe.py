"""An adapter in a few words and numbers, for people and scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter
from qlora_serve.adapters.folder import FolderEntry, scan_adapters
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import MANIFEST_FILE
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError

_MARKS = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "adapter_model.bin")


def describe(adapter: AdapterFiles, entry: FolderEntry | None = None) -> dict[str, Any]:
    """What an adapter is, as `adapters list --json` prints it.

    Args:
        adapter: its directory.
        entry: what a folder knows of it: its name, and of a managed one the identity, so that its
            weights need not be read.

    Raises:
        AdapterError: its weights cannot be read.
    """
    known = entry.identity if entry is not None else None
    path = adapter.path
    if entry is not None and entry.is_managed:
        path = path.parent.parent / entry.name  # the name, which outlives what it points to now
    return {
        "name": path.name if entry is None else entry.name,
        "path": str(path),
        "managed": entry is not None and entry.is_managed,
        "kind": kind_of(adapter.config),
        "rank": ranks_of(adapter.config),
        "target_modules": targets_of(adapter.config),
        "size_bytes": adapter.size_bytes,
        "base": adapter.base_name,
        "identity": known or content_identity(adapter),
    }


def describe_folder(folder: Path) -> list[dict[str, Any]]:
    """Every adapter in a folder, described; a broken one has `error` in place of the rest.

    Raises:
        ConfigError: the folder is missing.
    """
    entries = AdapterStore(folder).list()
    refused = scan_adapters(folder).refused
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        # Hidden directories are the store's own, or adapters that are still being written.
        if name.startswith("."):
            continue
        entry = entries.get(name)
        if entry is None and not any((path / mark).exists() for mark in _MARKS):
            continue
        try:
            if name in refused:
                raise AdapterError(refused[name])
            rows.append(describe(read_adapter(entry.path if entry else path), entry))
        except AdapterError as error:
            rows.append({"name": name, "path": str(path), "error": str(error)})
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
