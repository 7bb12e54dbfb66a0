"""Merging tensor by tensor: from the base's files to the output's, without the model in memory.

PEFT puts the adapter on a model without weights. Each output tensor is then made from the stored
one: copied, replaced by what the adapter brings, or merged. The plain low-rank update is computed
here in blocks of rows, by PEFT's own sequence of operations in float32 (product, scaling, sum, one
cast); everything else (DoRA, bias of the update, trained tokens) by PEFT's layer itself, which is
given its weight for that moment. Both equal `merge_and_unload` followed by one cast.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError
from qlora_serve.files import flush
from qlora_serve.merge.bake import attach_adapter, empty_weights, is_empty, relative_change
from qlora_serve.merge.tensor_files import (
    TORCH_DTYPES,
    PlannedTensor,
    StoredTensor,
    plan_shards,
    shard_header,
    shard_names,
    stored_tensors,
    tensor_bytes,
    write_index,
)
from qlora_serve.settings import parse_bytes

_PREFIX = "base_model.model."
_ADAPTER = "default"

OnTensor = Callable[[int], None]


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
    peft_model = attach_adapter(skeleton, adapter, weightless=True)
    merger = _Merger(peft_model, stored, getattr(torch, dtype))
    is_untied = False
    if tied is not None:
        merger.stored[tied] = stored[embedding]
        merger.share(embedding, tied)
        is_untied = _differ(merger, embedding, tied)
        if is_untied:
            names.append(tied)
    planned = [PlannedTensor(name, merger.dtype, merger.shape(name)) for name in names]
    _write(folder, planned, parse_bytes(max_shard_size), merger, on_tensor)
    model = build_skeleton(source, vocabulary)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.tie_word_embeddings = tied is not None and not is_untied
    return StreamedModel(model, dict(merger.changes), is_untied)


def count_tensors(source: BaseSource) -> int:
    """How many tensors `merge_streamed` will write, but for embeddings that get untied."""
    return len(stored_tensors(source))


@dataclass
class _Merger:
    """Makes output tensors, in blocks of rows."""

    peft_model: Any
    stored: dict[str, StoredTensor]
    dtype: Any
    """The torch dtype of the output."""
    changes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = {
            name.removeprefix(_PREFIX): module for name, module in self.peft_model.named_modules()
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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output tensor."""
        own = self._own_value(name)
        return tuple(own.shape) if own is not None else self.stored[name].shape

    def blocks(self, name: str) -> Iterator[Any]:
        """An output tensor's rows, cast to the output's dtype."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if isinstance(module, ModulesToSaveWrapper):
            yield self._cast(name, self._replacement(path, module, leaf))
        elif isinstance(module, (LoraLayer, TrainableTokensWrapper)):
            yield from self._merged(name, path, module, leaf)
        else:
            own = self._own_value(name)
            if own is not None:
                yield self._cast(name, own)
            else:
                for _, block in self.stored[name].rows():
                    yield self._cast(name, block)

    def _merged(self, name: str, path: str, module: Any, leaf: str) -> Iterator[Any]:
        own = self._own_value(name)
        if leaf == "bias" and not _has_update_bias(module):
            yield self._cast(name, own if own is not None else self.stored[name].whole())
        elif leaf == "weight" and own is None and _is_plain(module):
            yield from self._updated(name, path, module)
        else:
            yield self._cast(name, self._by_peft(path, module, leaf))

    def _updated(self, name: str, path: str, layer: Any) -> Iterator[Any]:
        """`W + scaling B A`, block by block."""
        a, b, is_embedding = _factors(layer)
        scaling = layer.scaling[_ADAPTER]
        old_square = 0.0
        scratch: tuple[Any, Any] | None = None
        # One row alone would go through another routine, with another order of additions.
        for first, block in self.stored[name].rows(least=2):
            if scratch is None or len(scratch[0]) < len(block):
                scratch = torch.empty(block.shape), torch.empty(block.shape)
            weight, delta = (part[: len(block)] for part in scratch)
            weight.copy_(block)
            rows = slice(first, first + len(block))
            if is_embedding:
                delta.copy_((b @ a[:, rows]).T)
            else:
                torch.mm(b[rows], a, out=delta)
            old_square += float(torch.dot(weight.flatten(), weight.flatten()))
            yield self._cast(name, weight.add_(delta.mul_(scaling)))
        change = abs(scaling) * _product_norm(a, b)
        self.changes[path] = change / sqrt(old_square) if old_square else change

    def _by_peft(self, path: str, module: Any, leaf: str) -> Any:
        """A parameter of a layer after PEFT has merged it, with its weights for that moment."""
        merging = module if isinstance(module, LoraLayer) else module.token_adapter
        base = merging.get_base_layer()
        before = {}
        for part, value in list(base.named_parameters(recurse=False)):
            loaded = value
            if is_empty(value):
                loaded = self.stored[f"{path}.{part}"].whole().float()
            before[part] = value
            setattr(base, part, torch.nn.Parameter(loaded, requires_grad=False))
        old = base.weight.detach().clone()
        try:
            merging.merge(safe_merge=True)
            merged = getattr(base, leaf).detach()
            if leaf == "weight":
                self.changes[path] = relative_change(old, merged)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise MergeError(f"PEFT cannot merge {path}: {reason}") from error
        finally:
            for part, value in before.items():
                setattr(base, part, value)
            merging.merged_adapters.clear()
        return merged

    def _replacement(self, path: str, wrapper: Any, leaf: str) -> Any:
        new = getattr(wrapper.modules_to_save[_ADAPTER], leaf).detach()
        stored = self.stored.get(f"{path}.{leaf}")
        if stored is not None and stored.shape == tuple(new.shape):
            change = relative_change(stored.whole().float(), new.float())
            self.changes[path] = max(change, self.changes.get(path, 0.0))
        else:
            self.changes[path] = 1.0  # an enlarged vocabulary has no old matrix of its size
        return new

    def _own_value(self, name: str) -> Any:
        """What the adapter's file gives for a parameter of the base itself, such as a bias."""
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if isinstance(module, ModulesToSaveWrapper):
            return getattr(module.modules_to_save[_ADAPTER], leaf).detach()
        value = getattr(_inner(module), leaf, None)
        return None if value is None or is_empty(value) else value.detach()

    def _cast(self, name: str, tensor: Any) -> Any:
        cast = tensor.to(self.dtype)
        if not _is_finite(cast):
            dtype, largest = str(self.dtype).removeprefix("torch."), float(tensor.abs().max())
            raise MergeError(
                f"{name} has values that do not fit into {dtype} (largest {largest:.4g}); use "
                "--dtype bfloat16 or float32"
            )
        return cast


def _is_finite(tensor: Any) -> bool:
    # The sum passes on any NaN or infinity, at a twentieth of the cost of looking for them; it may
    # be infinite without any.
    total = tensor.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _product_norm(a: Any, b: Any) -> float:
    """‖B A‖ (Frobenius), without B A: the trace of (A Aᵀ) (Bᵀ B)."""
    a, b = a.double(), b.double()
    return sqrt(max(0.0, float(((a @ a.T) * (b.T @ b)).sum())))


def _inner(module: Any) -> Any:
    """The base's own module, under what PEFT put around it."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _write(
    folder: Path, planned: list[PlannedTensor], limit: int, merger: _Merger, on_tensor: OnTensor
) -> None:
    shards = plan_shards(planned, limit)
    done = 0
    # Publishing waits until all is on the disk; that of one shard goes on beside the next one.
    with ThreadPoolExecutor(1) as pool:
        flushed = []
        for file, shard in zip(shard_names(len(shards)), shards, strict=True):
            with (folder / file).open("wb", buffering=0) as stream:
                stream.write(shard_header(shard))
                for tensor in shard:
                    for block in merger.blocks(tensor.name):
                        _write_all(stream, tensor_bytes(block))
                    done += 1
                    on_tensor(done)
            flushed.append(pool.submit(flush, folder / file))
    for result in flushed:
        result.result()
    write_index(folder, shards)


def _write_all(stream: Any, view: memoryview) -> None:
    while view:
        view = view[stream.write(view) :]


def _differ(merger: _Merger, one: str, other: str) -> bool:
    digests = set()
    for name in (one, other):
        digest = hashlib.blake2b()
        for block in merger.blocks(name):
            digest.update(tensor_bytes(block))
        digests.add(digest.digest())
    return len(digests) > 1


def _factors(layer: Any) -> tuple[Any, Any, bool]:
    """A [rank, in], B [out, rank] in float32, and whether they belong to an embedding."""
    if _ADAPTER in layer.lora_A:
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        return a.detach().float(), b.detach().float(), False
    a, b = layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER]
    return a.detach().float(), b.detach().float(), True


def _is_plain(module: Any) -> bool:
    """Whether a layer's update is `scaling B A`, added to its weight as it lies in the file."""
    return (
        type(module) in (Linear, Embedding)
        and _ADAPTER not in module.lora_variant
        and not module.fan_in_fan_out
    )


def _has_update_bias(module: Any) -> bool:
    return isinstance(module, LoraLayer) and bool(module.lora_bias.get(_ADAPTER))


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
