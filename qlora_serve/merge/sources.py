"""Which base an adapter is merged into, and whether it is the one that it was trained on."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.identity import fingerprint, read_header, weight_files
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, MergeError

BaseMatch = Literal["same", "same values", "unknown", "different"]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLED_TENSORS = 24


@dataclass(frozen=True)
class MergeBase:
    """The base that an adapter is merged into."""

    source: BaseSource
    fingerprint: str
    match: BaseMatch
    """How its weights compare with those that the adapter was trained on."""
    reason: str
    """How that is known, or why not, in words."""


def choose_base(adapter: AdapterFiles, given: str | None, allow_mismatch: bool) -> MergeBase:
    """The unquantized base for a merge: the given one, else the one that the adapter names.

    Raises:
        MergeError: it is quantized, cannot be found, or holds other weights than the adapter was
            trained on.
    """
    source = _given(given) if given is not None else _named(adapter)
    mark = fingerprint(source)
    match, reason = _compare(adapter, source, mark)
    if match == "different" and not allow_mismatch:
        raise MergeError(
            f"adapter {adapter.path} was not trained on {source.name}: {reason}; name its own base "
            "with --base, or pass --allow-base-mismatch"
        )
    return MergeBase(source, mark, match, reason)


def stored_dtype(source: BaseSource) -> str:
    """What most of a base's bytes are stored in: float32, float16 or bfloat16."""
    sizes: Counter[str] = Counter()
    for file in weight_files(source):
        for entry in read_header(file)[0].values():
            first, last = entry["data_offsets"]
            sizes[_DTYPES.get(entry["dtype"], "float32")] += last - first
    return sizes.most_common(1)[0][0]


def _given(name: str) -> BaseSource:
    source = locate_base(name)
    if source.quantization != "none":
        original = f", here {source.unquantized}" if source.unquantized else ""
        raise MergeError(
            f"the base {name} is quantized ({source.quantization}), and merging into rounded "
            f"weights bakes the rounding in; pass its unquantized original{original}, with --base"
        )
    return source


def _named(adapter: AdapterFiles) -> BaseSource:
    recorded = adapter.manifest.base.unquantized if adapter.manifest is not None else None
    name = recorded or adapter.base_name
    if name is None:
        raise MergeError(
            f"adapter {adapter.path} does not say which base it was trained on; pass --base with "
            "the unquantized one"
        )
    try:
        source = locate_base(name)
        # A quantized copy that this tool made knows its original.
        if source.quantization != "none" and source.unquantized:
            source = locate_base(source.unquantized)
    except BaseModelError as error:
        raise MergeError(
            f"the base {name!r} of adapter {adapter.path} cannot be used ({error}); pass --base "
            "with the unquantized base"
        ) from None
    if source.quantization != "none":
        raise MergeError(
            f"adapter {adapter.path} was trained on {source.name}, which is quantized "
            f"({source.quantization}), and nothing records its unquantized original; pass --base "
            "with it"
        )
    return source


def _compare(adapter: AdapterFiles, source: BaseSource, mark: str) -> tuple[BaseMatch, str]:
    if adapter.manifest is None:
        return "unknown", "the adapter was made elsewhere and records no fingerprint of its base"
    trained_on = adapter.manifest.base
    if mark == trained_on.fingerprint:
        return "same", "its fingerprint is the one that the adapter was trained on"
    original = _reachable(trained_on.name)
    if original is not None and fingerprint(original) != trained_on.fingerprint:
        original = None  # something else lies there by now
    if original is not None and original.quantization != "none":
        return _compare_with_record(original, source, mark)
    if original is not None:
        if _same_values(original, source):
            return "same values", f"its weights are those of {trained_on.name} in another dtype"
        return "different", f"its weights differ from those of {trained_on.name}"
    if trained_on.quantization != "none" and trained_on.unquantized != trained_on.name:
        return "unknown", (
            f"the adapter was trained on a quantized copy, {trained_on.name}, that is not here to "
            "be asked for its original"
        )
    return "different", (
        f"the fingerprints differ, and {trained_on.name} is not here to compare its weights"
    )


def _compare_with_record(copy: BaseSource, source: BaseSource, mark: str) -> tuple[BaseMatch, str]:
    """Compares a base with the original that a quantized copy was made from."""
    expected = copy.unquantized_fingerprint
    if expected is None:
        return "unknown", f"the quantized {copy.name} does not record what it was made from"
    if expected == mark:
        return "same", f"the quantized {copy.name} was made from it"
    original = _reachable(copy.unquantized)
    if original is not None and fingerprint(original) == expected:
        if _same_values(original, source):
            return "same values", f"its weights are those of {original.name} in another dtype"
        return "different", f"its weights differ from those of {original.name}"
    return "different", f"the quantized {copy.name} was made from a base with another fingerprint"


def _reachable(name: str | None) -> BaseSource | None:
    """A base that is on this disk; nothing is downloaded for a comparison."""
    if name is None or not (Path(name).expanduser().is_dir() or "/" not in name):
        return None
    try:
        return locate_base(name)
    except BaseModelError:
        return None


def _same_values(left: BaseSource, right: BaseSource) -> bool:
    """Whether two bases hold the same weights up to a cast of their dtype, by samples.

    A cast is exact to repeat, so even one light training step tells two bases apart.
    """
    places = [_tensor_files(source) for source in (left, right)]
    if places[0].keys() != places[1].keys():
        return False
    names = sorted(places[0])
    # Spread over the whole model.
    step = max(1, len(names) // _SAMPLED_TENSORS)
    return all(
        _equal_after_cast(_sample(places[0][name], name), _sample(places[1][name], name))
        for name in names[::step]
    )


def _tensor_files(source: BaseSource) -> dict[str, Path]:
    return {name: file for file in weight_files(source) for name in read_header(file)[0]}


def _sample(file: Path, name: str) -> Any:
    with safe_open(file, framework="pt") as tensors:
        part = tensors.get_slice(name)
        return part[:1] if part.get_shape() else tensors.get_tensor(name)


def _equal_after_cast(left: Any, right: Any) -> bool:
    if left.shape != right.shape:
        return False
    if left.dtype == right.dtype or left.dtype.itemsize != right.dtype.itemsize:
        narrow = min(left.dtype, right.dtype, key=lambda dtype: int(dtype.itemsize))
        return bool(left.to(narrow).equal(right.to(narrow)))
    # float16 beside bfloat16: each was rounded on its own.
    return torch.allclose(left.float(), right.float(), rtol=2.0**-7, atol=2.0**-24)
