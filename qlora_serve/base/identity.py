"""The fingerprint of a base model: which weights an adapter was trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from qlora_serve.base.source import BaseSource
from qlora_serve.errors import BaseModelError

_SAMPLE_BYTES = 4096


def fingerprint(source: BaseSource) -> str:
    """A hash of the model type and of every tensor's name, dtype, shape and sampled bytes.

    Three samples of 4 KiB a tensor (start, middle, end) tell two trainings of one architecture
    apart, since training moves every tensor, and cost milliseconds where hashing 15 GB costs a
    minute. Independent of how tensors are spread over files.

    Raises:
        BaseModelError: the directory holds no safetensors weights, or a file is cut short.
    """
    files = weight_files(source)
    lines: list[str] = []
    for file in files:
        lines.extend(_tensor_lines(file))
    digest = hashlib.sha256(f"{source.model_type}\n".encode())
    for line in sorted(lines):
        digest.update(line.encode())
    return "sha256:" + digest.hexdigest()


def weight_files(source: BaseSource) -> list[Path]:
    """The safetensors files of a base, in order of name.

    Raises:
        BaseModelError: there are none, or the index names a file that is missing.
    """
    index = source.path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (source.path / name).is_file()]
        if missing:
            raise BaseModelError(
                f"{source.path} is incomplete: {len(missing)} of {len(names)} weight files are "
                f"missing, first {missing[0]}"
            )
        return [source.path / name for name in names]
    files = sorted(source.path.glob("*.safetensors"))
    if not files:
        raise BaseModelError(f"{source.path} holds no *.safetensors weights")
    return files


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header (tensor name → dtype, shape, offsets) and where its data begin.

    Raises:
        ValueError: the file is not safetensors, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is not a whole safetensors file")
        header = json.loads(stream.read(length))
    start = 8 + length
    try:
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values() if entry["shape"] is not None]
        is_cut = any(start + end > size for end in ends)
    except (AttributeError, TypeError, KeyError, IndexError):
        raise ValueError(f"{file} has no safetensors header") from None
    if is_cut:
        raise ValueError(f"{file} is cut short")
    return header, start


def _tensor_lines(file: Path) -> list[str]:
    try:
        header, start = read_header(file)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot read the weights: {error}") from None
    lines = []
    with file.open("rb") as stream:
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            sample = _sample(stream, first, last)
            lines.append(f"{name} {entry['dtype']} {entry['shape']} {sample}\n")
    return lines


def _sample(stream: BinaryIO, first: int, last: int) -> str:
    digest = hashlib.sha256()
    middle = max(first, (first + last - _SAMPLE_BYTES) // 2)
    for offset in (first, middle, max(first, last - _SAMPLE_BYTES)):
        stream.seek(offset)
        digest.update(stream.read(min(_SAMPLE_BYTES, last - offset)))
    return digest.hexdigest()
