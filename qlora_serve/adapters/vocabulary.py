"""Vocabularies that grew in training: which rows an adapter holds, and what they come to."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import AdapterError

_PREFIX = "base_model.model."
# Under which names PEFT writes a whole embedding: as it is, under a low-rank update, under trained
# tokens. With `modules_to_save` the first is the trained copy.
_WHOLE = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
# What PEFT writes besides and does not read back.
_UNREAD = (".original_module.weight", ".modules_to_save.weight")
_BIASES = (".bias", ".base_layer.bias")


@dataclass(frozen=True)
class Embeddings:
    """Where a base has its embeddings."""

    input: str
    """The path of the input embedding."""
    output: str
    """The path of the output layer."""
    rows: int
    """Tokens of the vocabulary."""
    is_tied: bool
    """Whether the two share their weight."""

    @property
    def paths(self) -> tuple[str, str]:
        """Both."""
        return self.input, self.output


def find_embeddings(source: BaseSource) -> Embeddings:
    """The embeddings of a base."""
    skeleton = build_skeleton(source)
    inside, outside = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    paths = {module: name for name, module in skeleton.named_modules()}
    return Embeddings(
        paths[inside], paths[outside], inside.weight.shape[0], outside.weight is inside.weight
    )


def enlarged_vocabulary(adapter: AdapterFiles, embeddings: Embeddings) -> int | None:
    """The tokens of the vocabulary that an adapter was trained with, when the base has fewer.

    Raises:
        AdapterError: its embeddings differ in their sizes.
    """
    sizes = {
        info.shape[0]
        for path in embeddings.paths
        for ending in _WHOLE
        if (info := adapter.tensors.get(f"{_PREFIX}{path}{ending}")) is not None
    }
    larger = sorted(size for size in sizes if size > embeddings.rows)
    if len(larger) > 1:
        raise AdapterError(
            f"adapter {adapter.path} holds embeddings of {' and '.join(map(str, larger))} tokens; "
            "expected one size for input and output"
        )
    return larger[0] if larger else None


def is_whole_embedding(name: str, embeddings: Embeddings) -> bool:
    """Whether a tensor is a whole embedding or its bias, in any form that PEFT writes."""
    endings = (*_WHOLE, *_UNREAD, *_BIASES)
    return any(name == f"{_PREFIX}{path}{end}" for path in embeddings.paths for end in endings)


def find_whole(
    adapter: AdapterFiles,
    names: Collection[str],
    embeddings: Embeddings,
    saved: frozenset[str],
) -> dict[str, str]:
    """Path of each enlarged embedding → the tensor that holds it without low-rank updates.

    Args:
        adapter: for errors.
        names: the adapter's tensors without the common prefix.
        embeddings: of the base.
        saved: paths of `modules_to_save`.

    Raises:
        AdapterError: the new rows of one of them are not there.
    """
    found: dict[str, str] = {}
    for path in embeddings.paths:
        for ending in _WHOLE:
            if path + ending in names:
                found.setdefault(path, path + ending)
    # A tied one is the other, unless training made a copy of that.
    if embeddings.is_tied and len(found) == 1:
        (path,) = found
        if path not in saved or set(embeddings.paths) <= saved:
            return dict.fromkeys(embeddings.paths, found[path])
    missing = [path for path in embeddings.paths if path not in found]
    if missing:
        raise AdapterError(
            f"adapter {adapter.path} was trained with an enlarged vocabulary and holds no new rows "
            f"for {missing[0]}; save it again with PEFT's save_embedding_layers=True, or with that "
            "module in modules_to_save"
        )
    return found


def require_whole(adapter: AdapterFiles, embeddings: Embeddings, saved: frozenset[str]) -> None:
    """Checks that an adapter with an enlarged vocabulary holds both embeddings.

    Raises:
        AdapterError: see `find_whole`.
    """
    names = {name.removeprefix(_PREFIX) for name in adapter.tensors}
    find_whole(adapter, names, embeddings, saved)


def take_whole(
    adapter: AdapterFiles, rest: dict[str, Any], embeddings: Embeddings, saved: frozenset[str]
) -> dict[str, Any]:
    """Takes both enlarged embeddings out of `rest`, as they are without low-rank updates.

    Raises:
        AdapterError: see `find_whole`.
    """
    found = find_whole(adapter, rest, embeddings, saved)
    whole = {path: rest[name] for path, name in found.items()}
    for path in embeddings.paths:
        for ending in (*_WHOLE, *_UNREAD):
            rest.pop(path + ending, None)
    return whole


def enlarge(model: Any, adapter: AdapterFiles, vocabulary: int) -> None:
    """Gives a base the rows of an enlarged vocabulary, those that training started from included.

    What PEFT puts in place itself (`modules_to_save`) is left to it.
    """
    import torch

    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    tensors = adapter.load_tensors()
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for path, module in model.named_modules():
            if not any(module is layer for layer in layers) or is_replaced(adapter, path):
                continue
            for parameter, endings in (("weight", _WHOLE), ("bias", _BIASES)):
                for ending in endings:
                    value = tensors.get(f"{_PREFIX}{path}{ending}")
                    if value is not None:
                        getattr(module, parameter).copy_(value)


def is_replaced(adapter: AdapterFiles, path: str) -> bool:
    """Whether a module is one of those that the adapter's config names in `modules_to_save`."""
    names = adapter.config.get("modules_to_save") or []
    return any(path == name or path.endswith(f".{name}") for name in names)


def take_bias(rest: dict[str, Any], path: str) -> dict[str, Any]:
    """Takes the bias of an enlarged output layer out of `rest`, if it is there."""
    taken = [rest.pop(path + ending, None) for ending in _BIASES]
    found = [bias for bias in taken if bias is not None]
    return {"bias": found[0]} if found else {}
