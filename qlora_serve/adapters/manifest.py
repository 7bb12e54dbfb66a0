"""`qlora_serve.json`: what training leaves behind so that serving and merging need no guess."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_serve.errors import AdapterError

MANIFEST_FILE = "qlora_serve.json"
_RECORDED_PACKAGES = (
    "qlora-serve", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors",
)  # fmt: skip


class ManifestBase(BaseModel):
    """The base that an adapter was trained on."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    name: str
    """As it was given to training: a directory, a prepared name or a hub id."""
    fingerprint: str
    """See `base.identity.fingerprint`."""
    quantization: str
    """What its weights were quantized to while training: none, nf4, int8, gptq ..."""
    dtype: str
    """What training computed in."""
    unquantized: str | None
    """The unquantized base, which merging loads; None when nobody knows it."""


class Manifest(BaseModel):
    """The content of qlora_serve.json."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    format: int = 1
    """The version of this file's layout."""
    base: ManifestBase
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Every setting of the training run."""
    data: dict[str, Any] = Field(default_factory=dict)
    """The data file, its hash, and its counts of rows and tokens."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Losses, steps and speed."""
    probes: list[list[int]] = Field(default_factory=list)
    """Token ids of a few prompts of the run's data, with which a merge is proven."""
    probes_from: Literal["held-out rows", "training rows"] | None = None
    """Which rows these prompts are of; None where nobody recorded it."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """The tokens at which this adapter was trained to stop."""
    versions: dict[str, str] = Field(default_factory=dict)
    """The packages that made it."""


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that shape an adapter."""
    found = {}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes qlora_serve.json into an adapter's directory."""
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Reads qlora_serve.json; None when the adapter was made elsewhere.

    Raises:
        AdapterError: the file is there and cannot be read.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(f"{file} cannot be read ({reason})") from None
