"""Vocabularies that grew in training: which rows an adapter holds, and what they come to."""

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


def take_whole(
    adapter: AdapterFiles, rest: dict[str, Any], embeddings: Embeddings, saved: frozenset[str]
) -> dict[str, Any]:
    """Takes both enlarged embeddings out of `rest`, as they are without low-rank updates.

    Args:
        adapter: for errors.
        rest: the adapter's tensors without the common prefix.
        embeddings: of the base.
        saved: paths of `modules_to_save`.

    Raises:
        AdapterError: the new rows of one of them are not there.
    """
    found: dict[str, Any] = {}
    for path in embeddings.paths:
        for ending in _UNREAD:
            rest.pop(path + ending, None)
        for ending in _WHOLE:
            tensor = rest.pop(path + ending, None)
            if tensor is not None:
                found.setdefault(path, tensor)
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


def take_bias(rest: dict[str, Any], path: str) -> dict[str, Any]:
    """Takes the bias of an enlarged output layer out of `rest`, if it is there."""
    taken = [rest.pop(path + ending, None) for ending in _BIASES]
    found = [bias for bias in taken if bias is not None]
    return {"bias": found[0]} if found else {}
