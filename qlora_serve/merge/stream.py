"""Merging tensor by tensor: from the base's files to the output's, without the model in memory.

PEFT puts the adapter on a model without weights, and tells by that which of its modules it changes
and how. Each output tensor then has a recipe that makes its rows from the stored ones: copied,
replaced by what the adapter brings, or updated. What only PEFT's own layer can make (DoRA on an
embedding, say) is made by it, as a whole, with its weight lent for that moment.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError
from qlora_serve.merge.bake import attach_adapter, empty_weights, is_empty
from qlora_serve.merge.recipes import (
    Change,
    Copied,
    MadeByPeft,
    Recipe,
    Replaced,
    Updated,
    WithTokens,
)
from qlora_serve.merge.shards import OnTensor, write_shards
from qlora_serve.merge.tensor_files import (
    TORCH_DTYPES,
    HeldTensor,
    PlannedTensor,
    StoredTensor,
    stored_tensors,
)
from qlora_serve.settings import parse_bytes

_PREFIX = "base_model.model."
_ADAPTER = "default"


@dataclass(frozen=True)
class StreamedModel:
    """What a streamed merge wrote, but for the config."""

    model: Any
    """The merged model's skeleton, with its config."""
    changes: dict[str, float]
    """Module → ‖new weight - old weight‖ / ‖old weight‖."""
    is_untied: bool
    """Whether the base's tied embeddings had to become two matrices."""


def why_not_streamable(source: BaseSource) -> str | None:
    """Why a base's files cannot be merged tensor by tensor, in words; None when they can.

    Its tensors must be the model's own parameters under the same names; transformers converts some
    architectures (experts kept apart in the file, say) while it loads them.
    """
    skeleton = build_skeleton(source)
    stored = stored_tensors(source)
    names = skeleton.state_dict()
    tied = _tied_head(skeleton)
    missing = sorted(name for name in names if name not in stored and name != tied)
    if missing:
        return f"its files hold no tensor {missing[0]}"
    if tied is not None and tied in stored:
        return f"its files hold {tied}, which its config ties to the embeddings"
    for name in names:
        entry = stored.get(name)
        if entry is not None and entry.dtype not in TORCH_DTYPES:
            return f"{name} is stored as {entry.dtype}"
        if entry is not None and entry.shape != tuple(names[name].shape):
            return f"{name} has another shape in the file"
    return None


def merge_streamed(
    folder: Path,
    source: BaseSource,
    adapter: AdapterFiles,
    dtype: str,
    max_shard_size: str,
    vocabulary: int | None,
    on_tensor: OnTensor,
) -> StreamedModel:
    """Merges an adapter and writes the weights' files; config and tokenizer are the caller's.

    Raises:
        MergeError: a value is NaN or does not fit the dtype, or PEFT cannot merge a layer.
    """
    skeleton = build_skeleton(source, vocabulary)
    tied, stored = _tied_head(skeleton), stored_tensors(source)
    names = [name for name in skeleton.state_dict() if name != tied]
    embedding = _embedding_name(skeleton)
    empty_weights(skeleton)
    planner = _Planner(attach_adapter(skeleton, adapter, weightless=True), stored)
    recipes = {name: planner.recipe(name) for name in names}
    torch_dtype = getattr(torch, dtype)
    if tied is not None:
        stored[tied] = stored[embedding]
        planner.share(embedding, tied)
        recipes[tied] = planner.recipe(tied)
    is_untied = tied is not None and _differ(recipes[embedding], recipes[tied], torch_dtype)
    planned = {
        PlannedTensor(name, torch_dtype, recipe.shape): recipe
        for name, recipe in recipes.items()
        if is_untied or name != tied
    }
    changes = write_shards(folder, planned, parse_bytes(max_shard_size), on_tensor)
    if tied is not None:
        changes.setdefault(tied, changes[embedding])
    model = build_skeleton(source, vocabulary)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.tie_word_embeddings = tied is not None and not is_untied
    return StreamedModel(model, _by_module(recipes, changes), is_untied)


def count_tensors(source: BaseSource) -> int:
    """How many tensors `merge_streamed` will write, but for embeddings that get untied."""
    return len(stored_tensors(source))


class _Planner:
    """Finds out how each output tensor is made."""

    def __init__(self, peft_model: Any, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored
        self._modules = {
            name.removeprefix(_PREFIX): module for name, module in peft_model.named_modules()
        }

    def share(self, embedding: str, head: str) -> None:
        """Gives a tied output layer the embedding that the adapter brings along, as a whole."""
        module = self._modules[embedding.rpartition(".")[0]]
        own = self._own_value(embedding)
        if own is None or isinstance(module, ModulesToSaveWrapper):
            return
        layer = _inner(self._modules[head.rpartition(".")[0]])
        if is_empty(layer.weight):
            layer.weight = torch.nn.Parameter(own, requires_grad=False)

    def recipe(self, name: str) -> Recipe:
        """How an output tensor is made."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        own, stored = self._own_value(name), self._stored.get(name)
        source = HeldTensor(own) if own is not None else self._stored[name]
        if isinstance(module, ModulesToSaveWrapper):
            has_size = stored is not None and stored.shape == source.shape
            return Replaced(source, stored if has_size else None)
        if isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            trained = tokens.trainable_tokens_delta[_ADAPTER].detach().float()
            return WithTokens(source, list(tokens.token_indices[_ADAPTER]), trained)
        if isinstance(module, LoraLayer):
            if leaf == "weight":
                return self._updated(path, module, source)
            if leaf == "bias" and bool(module.lora_bias.get(_ADAPTER)):
                bias = own if own is not None else self._stored[name].whole()
                update = module.lora_B[_ADAPTER].bias.detach().float()
                return Copied(HeldTensor(bias.float() + update * module.scaling[_ADAPTER]))
        return Copied(source)

    def _updated(self, path: str, layer: Any, source: HeldTensor | StoredTensor) -> Recipe:
        variant = layer.lora_variant.get(_ADAPTER)
        has_dora = type(layer) is Linear and type(variant) is DoraLinearVariant
        is_known = type(layer) in (Linear, Embedding) and (variant is None or has_dora)
        if not is_known or layer.fan_in_fan_out:
            return MadeByPeft(source.shape, lambda change: self._by_peft(path, layer, change))
        a, b, is_embedding = _factors(layer)
        lengths = layer.lora_magnitude_vector[_ADAPTER].weight.detach() if has_dora else None
        return Updated(source, a, b, layer.scaling[_ADAPTER], is_embedding, lengths)

    def _by_peft(self, path: str, layer: Any, change: Change) -> Any:
        """A layer's weight after PEFT has merged it, with its parameters for that moment."""
        base = layer.get_base_layer()
        before = dict(base.named_parameters(recurse=False))
        try:
            for part, value in before.items():
                held = is_empty(value)
                loaded = self._stored[f"{path}.{part}"].whole().float() if held else value
                setattr(base, part, torch.nn.Parameter(loaded, requires_grad=False))
            old = base.weight.detach().clone()
            layer.merge(safe_merge=True)
            merged = base.weight.detach()
            change.add(Change(float(old.norm()) ** 2, float(old.sub_(merged).norm()) ** 2))
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise MergeError(f"PEFT cannot merge {path}: {reason}") from error
        finally:
            for part, value in before.items():
                setattr(base, part, value)
            layer.merged_adapters.clear()
        return merged

    def _own_value(self, name: str) -> Any:
        """What the adapter's file gives for a parameter of the base itself, such as a bias."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if isinstance(module, ModulesToSaveWrapper):
            return getattr(module.modules_to_save[_ADAPTER], leaf).detach()
        value = getattr(_inner(module), leaf, None)
        return None if value is None or is_empty(value) else value.detach()


def _by_module(recipes: dict[str, Recipe], changes: dict[str, Change]) -> dict[str, float]:
    """Module → how far its weights were moved, for those that the adapter changes."""
    found: dict[str, float] = {}
    for name, recipe in recipes.items():
        if isinstance(recipe, Copied):
            continue
        path = name.rpartition(".")[0]
        found[path] = max(changes[name].relative, found.get(path, 0.0))
    return found


def _inner(module: Any) -> Any:
    """The base's own module, under what PEFT put around it."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _differ(one: Recipe, other: Recipe, dtype: Any) -> bool:
    """Whether two tensors of one shape will have other values."""
    if isinstance(one, Copied) and one == other:
        return False
    if isinstance(one, MadeByPeft) or isinstance(other, MadeByPeft):
        return True  # only a layer of the adapter's makes those
    pairs = zip(*(part.blocks(0, part.shape[0], Change()) for part in (one, other)), strict=True)
    return any(not a.to(dtype).equal(b.to(dtype)) for a, b in pairs)


def _factors(layer: Any) -> tuple[Any, Any, bool]:
    """A [rank, in], B [out, rank] in float32, and whether they belong to an embedding."""
    if _ADAPTER in layer.lora_A:
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        return a.detach().float(), b.detach().float(), False
    a, b = layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER]
    return a.detach().float(), b.detach().float(), True


def _tied_head(skeleton: Any) -> str | None:
    """The name of the output embedding's weight where it is the input embedding's too."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, module in skeleton.named_modules() if module is head)


def _embedding_name(skeleton: Any) -> str:
    embedding = skeleton.get_input_embeddings()
    return next(
        f"{name}.weight" for name, module in skeleton.named_modules() if module is embedding
    )
