"""Vocabularies that grew in training: the base's embeddings get the adapter's rows."""

from typing import Any

import torch

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError

_PREFIX = "base_model.model."
# Before a whole embedding's name: as it is, under a low-rank update, under trained tokens.
_INFIXES = ("", "base_layer.", "token_adapter.base_layer.")


def enlarged_vocabulary(adapter: AdapterFiles, source: BaseSource) -> int | None:
    """The rows of the embeddings that an adapter was trained with, when the base has fewer.

    Raises:
        MergeError: the adapter's two embeddings differ in their rows, or it does not hold the new
            rows of both.
    """
    skeleton = build_skeleton(source)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    paths = {
        name: module for name, module in skeleton.named_modules() if module in (embedding, head)
    }
    rows = embedding.weight.shape[0]
    whole = {path: _whole_rows(adapter, path) for path in paths}
    sizes = {size for size in whole.values() if size is not None and size > rows}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise MergeError(
            f"adapter {adapter.path} holds embeddings of {' and '.join(map(str, sorted(sizes)))} "
            "rows; expected one size for both"
        )
    (size,) = sizes
    is_tied = head is not None and head.weight is embedding.weight
    missing = [path for path, found in whole.items() if found != size]
    if missing and not (is_tied and _shares_rows(adapter, list(paths))):
        raise MergeError(
            f"adapter {adapter.path} was trained with a vocabulary of {size} tokens, the base has "
            f"{rows}, and the adapter holds no new rows for {missing[0]}; save it again with "
            "PEFT's save_embedding_layers=True, or with that module in modules_to_save"
        )
    return size


def enlarge(model: Any, adapter: AdapterFiles, vocabulary: int) -> None:
    """Gives a base the rows of an enlarged vocabulary, those that training started from included.

    Rows that PEFT loads itself (`modules_to_save`) are put in place by PEFT later.
    """
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    tensors = adapter.load_tensors()
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        if not any(module is layer for layer in layers) or replaced_whole(adapter, path):
            continue
        for infix in _INFIXES:
            rows = tensors.get(f"{_PREFIX}{path}.{infix}weight")
            if rows is not None:
                with torch.no_grad():
                    module.weight.copy_(rows)


def replaced_whole(adapter: AdapterFiles, path: str) -> bool:
    """Whether a module is one of the adapter's `modules_to_save`."""
    names = adapter.config.get("modules_to_save") or []
    return any(path == name or path.endswith(f".{name}") for name in names)


def _whole_rows(adapter: AdapterFiles, path: str) -> int | None:
    for infix in _INFIXES:
        info = adapter.tensors.get(f"{_PREFIX}{path}.{infix}weight")
        if info is not None:
            return info.shape[0]
    return None


def _shares_rows(adapter: AdapterFiles, paths: list[str]) -> bool:
    """Whether the rows of one tied matrix are the other's too."""
    replaced = [path for path in paths if replaced_whole(adapter, path)]
    return not replaced or bool(adapter.config.get("ensure_weight_tying"))
