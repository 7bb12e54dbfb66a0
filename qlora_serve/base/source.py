"""Where a base model's files are, and what its config says: no weight is read here, nor torch."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_serve.errors import BaseModelError

# Safetensors only: a pickle runs code when it is read.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*"]

PREPARED_NAMES = ("smollm2",)
PREPARED_RECORD = "qlora_serve_base.json"
"""Written beside a base that this tool made; names the unquantized original of a quantized one."""


def cache_folder() -> Path:
    """The folder of prepared bases: `QLORA_SERVE_CACHE`, else `~/.cache/qlora-serve`."""
    moved = os.environ.get("QLORA_SERVE_CACHE")
    return Path(moved) if moved else Path.home() / ".cache" / "qlora-serve"


def prepared_path(name: str) -> Path:
    """Where `base prepare NAME` puts its result when no output is named."""
    return cache_folder() / "bases" / name


@dataclass(frozen=True)
class BaseSource:
    """A base model on disk."""

    name: str
    """As the user gave it: a directory, a prepared name or a hub id."""
    path: Path
    """The directory that holds config.json."""
    trust_remote_code: bool = False
    """Whether Python code in that directory may be run."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return _read_json(self.path / "config.json")

    @property
    def model_type(self) -> str:
        """The architecture's family, such as `llama`."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def quantization_settings(self) -> dict[str, Any]:
        """How the stored weights are quantized, as their maker wrote it; empty if they are not.

        AutoGPTQ keeps it in a file of its own, and its early versions only there.
        """
        settings = self.config.get("quantization_config")
        own_file = self.path / "quantize_config.json"
        if settings or not own_file.is_file():
            return dict(settings or {})
        return {"quant_method": "gptq"} | _read_json(own_file)

    @property
    def quantization(self) -> str:
        """How the stored weights are quantized: `none`, `nf4`, `int8`, `gptq`, `awq` ..."""
        settings = self.quantization_settings
        if not settings:
            return "none"
        method = str(settings.get("quant_method", "unknown"))
        if method == "bitsandbytes":
            return "int8" if settings.get("load_in_8bit") else "nf4"
        return method

    @property
    def unquantized(self) -> str | None:
        """The base that this quantized one was made from, when this tool made it."""
        return self._record.get("unquantized")

    @property
    def unquantized_fingerprint(self) -> str | None:
        """The fingerprint of that base, when it was made."""
        return self._record.get("unquantized_fingerprint")

    @cached_property
    def _record(self) -> dict[str, Any]:
        record = self.path / PREPARED_RECORD
        return _read_json(record) if record.is_file() else {}

    @property
    def display_name(self) -> str:
        """The name that a server reports: a directory's last part, or the id itself."""
        return self.path.name if Path(self.name).exists() else self.name


def locate_base(name: str, weights: bool = True, trust_remote_code: bool = False) -> BaseSource:
    """Finds a base model by directory, prepared name or hub id.

    Args:
        name: which.
        weights: whether they are wanted too; without them a hub gives config.json alone.
        trust_remote_code: whether Python code that comes with it may be run.

    Raises:
        BaseModelError: nothing usable is there; the message says what was tried.
    """
    given = Path(name).expanduser()
    if given.is_dir():
        return _checked(BaseSource(name, given.resolve(), trust_remote_code))
    if name in PREPARED_NAMES:
        prepared = prepared_path(name)
        if not prepared.is_dir():
            raise BaseModelError(
                f"the base {name!r} is not prepared yet; run `qlora-serve base prepare {name}` once"
            )
        return _checked(BaseSource(name, prepared, trust_remote_code))
    if given.is_file():
        raise BaseModelError(
            f"{name} is a file; expected the directory of a model, with its config.json"
        )
    if _looks_like_hub_id(name):
        files = _HUB_FILES if weights else ["config.json"]
        code = ["*.py"] if trust_remote_code else []
        return _checked(BaseSource(name, _download(name, files + code), trust_remote_code))
    raise BaseModelError(
        f"no base model at {name!r}: no such directory, and not a hub id like 'org/model' "
        f"(prepared names: {', '.join(PREPARED_NAMES)})"
    )


def loading_reason(error: Exception, most: int = 300) -> str:
    """Why transformers could not load something, on one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it needs Python code that its directory brings along; only `serve "
            "--trust-remote-code` runs that, if you trust it"
        )
    return text[:most]


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~", "/"))


def _download(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelError(
            f"no base model at {name!r}: no such directory, and the hub does not give it ({reason})"
        ) from None


def _checked(source: BaseSource) -> BaseSource:
    if not (source.path / "config.json").is_file():
        hint = ""
        if (source.path / "adapter_config.json").is_file():
            hint = "; this is an adapter, not a base model"
        raise BaseModelError(f"{source.path} has no config.json, so it is not a model{hint}")
    if not source.model_type:
        raise BaseModelError(f"{source.path}/config.json names no model_type")
    return source


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{file} holds no JSON object")
    return content
