"""Reading an adapter's directory: its config, its manifest and its tensors' headers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import Manifest, read_manifest
from qlora_serve.base.identity import read_header
from qlora_serve.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's dtype (safetensors' name for it, such as F32) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory, read but for its weights."""

    path: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    manifest: Manifest | None
    """qlora_serve.json; None when the adapter was made elsewhere."""
    tensors: Mapping[str, TensorInfo]
    """Name → dtype and shape, from the header of adapter_model.safetensors."""

    @property
    def base_name(self) -> str | None:
        """The base that the adapter says it was trained on."""
        if self.manifest is not None:
            return self.manifest.base.name
        return self.config.get("base_model_name_or_path") or None

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights' file."""
        return (self.path / WEIGHTS_FILE).stat().st_size

    def load_tensors(self) -> dict[str, Any]:
        """Reads every tensor to the CPU, as stored.

        Into memory of its own: tensors that lie in the mapped file would change with it.

        Raises:
            AdapterError: the file went away or is corrupt.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load((self.path / WEIGHTS_FILE).read_bytes())
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{self.path / WEIGHTS_FILE} cannot be read: {error}") from None


def read_adapter(path: Path) -> AdapterFiles:
    """Reads an adapter's directory, without its weights.

    Raises:
        AdapterError: it is missing, is no PEFT directory, holds pickled weights only, or its files
            are broken.
    """
    if not path.is_dir():
        raise AdapterError(f"no adapter at {path}: no such directory")
    config = _read_config(path)
    return AdapterFiles(path.resolve(), config, read_manifest(path), _read_tensors(path))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        hint = "; this is a whole model, not an adapter" if (path / "config.json").is_file() else ""
        raise AdapterError(f"{path} has no {CONFIG_FILE}, so it is not a PEFT adapter{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds no JSON object")
    return config


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise AdapterError(
                f"{path} holds pickled weights ({pickles[0]}), which can run code when read; save "
                f"the adapter again with PEFT's save_pretrained(safe_serialization=True) to get "
                f"{WEIGHTS_FILE}"
            )
        raise AdapterError(f"{path} has no {WEIGHTS_FILE}")
    try:
        header, _ = read_header(file)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
    }
