"""`recipe.yaml`: the settings that make this adapter again."""

from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import Manifest
from qlora_serve.train.config import TrainSettings

RECIPE_FILE = "recipe.yaml"

# Where a run writes and how it went on is not what it computes.
_NOT_PART = ("output", "resume", "node_rank", "rendezvous")


def recipe_text(manifest: Manifest) -> str:
    """The recipe of a run as YAML: all that differs from the defaults, and the seed."""
    import yaml

    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in TrainSettings.model_fields.items()
        if not field.is_required()
    }
    given = {
        name: value
        for name, value in manifest.recipe.items()
        if name == "seed" or (name not in _NOT_PART and not _same(value, defaults.get(name)))
    }
    given["base"] = manifest.base.name
    # So that files are found from any directory; a hub's name is no file and stays.
    given["data"] = [_findable(text) for text in given.get("data", [])]
    if given.get("eval_data"):
        given["eval_data"] = _findable(given["eval_data"])
    header = [
        "# Makes this adapter again, bit for bit on the same machine and versions:",
        "#",
        "#   qlora-serve train --config recipe.yaml --output NEW_DIRECTORY",
        "#",
        f"# base fingerprint: {manifest.base.fingerprint}",
    ]
    if "sha256" in manifest.data:
        header.append(f"# data sha256: {manifest.data['sha256']}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    header.append(f"# versions: {versions}")
    body = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(header) + "\n" + body


def _findable(text: str) -> str:
    """A data source with its file's whole path, if it is a file; FILE:0.3 keeps its weight."""
    name, colon, weight = text.rpartition(":")
    if Path(text).exists():
        return str(Path(text).resolve())
    return f"{Path(name).resolve()}:{weight}" if colon and Path(name).exists() else text


def _same(value: Any, default: Any) -> bool:
    """Whether a value read from JSON is the default."""
    if isinstance(default, tuple):
        return list(default) == value
    return bool(value == default)
