"""Reading an adapter's directory: its config, its manifest and its tensors' headers."""

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import Manifest, read_manifest
from qlora_serve.adapters.shortage import is_shortage
from qlora_serve.base.identity import read_header
from qlora_serve.errors import AdapterError
from qlora_serve.wording import counted

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# transformers' save_pretrained splits an adapter past `max_shard_size`, and calls the index after
# a whole model's; PEFT itself writes one file always.
_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
INDEX_FILES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")


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
    """Name → dtype and shape, from the headers of its weights' files."""
    weight_files: tuple[Path, ...]
    """adapter_model.safetensors, or its shards in order."""

    @property
    def base_name(self) -> str | None:
        """The base that the adapter says it was trained on."""
        if self.manifest is not None:
            return self.manifest.base.name
        return self.config.get("base_model_name_or_path") or None

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights' files."""
        return sum(file.stat().st_size for file in self.weight_files)

    def load_tensors(self) -> dict[str, Any]:
        """Reads every tensor to the CPU, as stored.

        Into memory of its own: tensors that lie in the mapped file would change with it.

        Raises:
            AdapterError: a file went away or is corrupt.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        tensors: dict[str, Any] = {}
        for file in self.weight_files:
            try:
                tensors.update(load(file.read_bytes()))
            except FileNotFoundError:
                raise AdapterError(_gone(self.path) or f"{file} was removed meanwhile") from None
            except (OSError, SafetensorError) as error:
                if is_shortage(error):
                    raise
                raise AdapterError(f"{file} cannot be read: {error}") from None
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                # safetensors' Rust code panics without memory, past every `except Exception`.
                raise MemoryError(f"reading {file}: {error}") from None
        return tensors


def read_adapter(path: Path) -> AdapterFiles:
    """Reads an adapter's directory, without its weights.

    Raises:
        AdapterError: it is missing, is no PEFT directory, holds pickled weights only, or its files
            are broken.
    """
    if not path.is_dir():
        raise AdapterError(_gone(path) or f"no adapter at {path}: no such directory")
    path = path.resolve()  # so that a name that is replaced meanwhile does not mix two adapters
    config = _read_config(path)
    files = _weight_files(path)
    return AdapterFiles(path, config, read_manifest(path), _read_tensors(path, files), files)


def _gone(path: Path) -> str | None:
    """Why content of a store is not there."""
    real = path.resolve()
    if real.parent.name != ".objects" or real.is_dir():
        return None
    return f"the adapter at {path} is gone: it was removed from the store, or replaced, since"


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


def _weight_files(path: Path) -> tuple[Path, ...]:
    single = path / WEIGHTS_FILE
    if single.is_file():
        return (single,)  # PEFT reads this one, whatever else is there
    shards = sorted(file for file in path.iterdir() if _SHARD.fullmatch(file.name))
    if shards:
        counts = {match[2] for file in shards if (match := _SHARD.fullmatch(file.name))}
        if len(counts) > 1 or len(shards) != int(min(counts)):
            raise AdapterError(
                f"{path} is incomplete: it has {len(shards)} shards of {' or '.join(counts)} "
                f"(first {shards[0].name})"
            )
        return tuple(shards)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise AdapterError(
            f"{path} holds pickled weights ({pickles[0]}), which can run code when read; make "
            f"{WEIGHTS_FILE} of them with `qlora-serve adapters convert {path} NEW_DIR`"
        )
    raise AdapterError(f"{path} has no {WEIGHTS_FILE}")


def _read_tensors(path: Path, files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            header, _ = read_header(file)
        except (OSError, ValueError) as error:
            raise AdapterError(f"{file} cannot be read: {error}") from None
        twice = sorted(tensors.keys() & header.keys())
        if twice:
            raise AdapterError(f"{path} holds {twice[0]} twice, the second in {file.name}")
        for name, entry in header.items():
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    if len(files) > 1:
        _check_index(path, tensors.keys())
    return tensors


def _check_index(path: Path, names: Set[str]) -> None:
    """An index is not needed, as shards say how many they are; but it must not disagree."""
    for file in (path / name for name in INDEX_FILES):
        if not file.is_file():
            continue
        try:
            listed = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{file} cannot be read: {error!r}") from None
        if different := sorted(listed ^ names):
            raise AdapterError(
                f"{file} and the shards beside it disagree on "
                f"{counted(len(different), 'tensor', 'tensors')}, first {different[0]}; they are "
                "of different adapters"
            )
