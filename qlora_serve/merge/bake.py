"""Putting an adapter onto a model, and into its weights. PEFT does both."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from qlora_serve.adapters.vocabulary import is_replaced
from qlora_serve.base.gptq import before_peft
from qlora_serve.errors import MergeError

_PREFIX = "base_model.model."
_ZERO = torch.zeros(1)

OnLayer = Callable[[int], None]


@dataclass(frozen=True)
class BakedModel:
    """A transformers model that holds an adapter in its weights."""

    model: Any
    changes: dict[str, float]
    """Module → ‖new weight - old weight‖ / ‖old weight‖."""
    is_untied: bool
    """Whether the base's tied embeddings had to become two matrices."""


def attach_adapter(model: Any, adapter: AdapterFiles, weightless: bool = False) -> Any:
    """The `PeftModel` of a base model and an adapter that was checked to fit it.

    A tied embedding that the adapter touches is given its own storage first: an update of the one
    matrix would otherwise be written into the other too, which is not what was trained
    (PEFT issue 2777). Values, and so answers, stay the same.

    Args:
        model: the base.
        adapter: the adapter.
        weightless: the base has no weights but `empty_weights`; the adapter gets its own all the
            same, by replacing tensors instead of writing into them.

    Raises:
        MergeError: PEFT refuses it.
    """
    if _touches_tied_embeddings(model, adapter):
        head = model.get_output_embeddings()
        weight = head.weight.detach()
        own = weight if weightless else weight.clone()
        head.weight = torch.nn.Parameter(own, requires_grad=False)
    before_peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied embeddings, which are dealt with
            with _as_peft_reads(adapter) as folder:
                return PeftModel.from_pretrained(
                    model, str(folder), low_cpu_mem_usage=weightless
                ).eval()
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MergeError(f"PEFT cannot load adapter {adapter.path}: {reason}") from error


@contextmanager
def _as_peft_reads(adapter: AdapterFiles) -> Iterator[Path]:
    """The adapter's directory; for one in shards, which PEFT does not read, a copy in one file."""
    if [file.name for file in adapter.weight_files] == [WEIGHTS_FILE]:
        yield adapter.path
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(adapter.path / CONFIG_FILE, folder / CONFIG_FILE)
        save_file(adapter.load_tensors(), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        yield folder


def empty_weights(skeleton: Any) -> None:
    """Gives a model on the meta device weights on the CPU that take no memory: one shared zero.

    PEFT moves an adapter to where its base's weights are, and on the meta device it would lose its
    own.
    """
    made: dict[int, Any] = {}  # tied parameters stay tied
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                zeros = _ZERO.expand(parameter.shape)
                made[id(parameter)] = torch.nn.Parameter(zeros, requires_grad=False)
            setattr(module, name, made[id(parameter)])


def is_empty(weight: Any) -> bool:
    """Whether a weight is one of `empty_weights`."""
    return bool(weight.untyped_storage().data_ptr() == _ZERO.untyped_storage().data_ptr())


def count_layers(peft_model: Any) -> int:
    """How many layers `bake` will change."""
    return sum(isinstance(module, LoraLayer) for module in peft_model.modules())


def bake(peft_model: Any, on_layer: OnLayer) -> BakedModel:
    """Merges an attached adapter into its base's weights, in their own dtype, and takes PEFT away.

    Args:
        peft_model: what `attach_adapter` gave; it must not be used any more afterwards.
        on_layer: called with the count of merged layers after each.

    Raises:
        MergeError: a merged weight is NaN or infinite, or PEFT cannot merge a layer.
    """
    was_tied = bool(peft_model.get_base_model().config.tie_word_embeddings)
    changes: dict[str, float] = {}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # PEFT warns that merge_and_unload meets layers that are merged already: they are,
            # one by one, so that each layer's change can be measured with one spare weight.
            warnings.simplefilter("ignore")
            for name, module in peft_model.named_modules():
                if isinstance(module, LoraLayer):
                    changes[name.removeprefix(_PREFIX)] = _merge_layer(module)
                    on_layer(len(changes))
                elif isinstance(module, ModulesToSaveWrapper):
                    changes[name.removeprefix(_PREFIX)] = _replacement_change(module)
                elif isinstance(module, TrainableTokensWrapper):
                    changes[name.removeprefix(_PREFIX)] = _tokens_change(module)
            model = peft_model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MergeError(f"PEFT cannot merge this adapter: {reason}") from error
    _tie_equal_embeddings(model, was_tied)
    return BakedModel(model, changes, was_tied and not model.config.tie_word_embeddings)


def _touches_tied_embeddings(model: Any, adapter: AdapterFiles) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    paths = [name for name, module in model.named_modules() if module in (embedding, head)]
    stems = tuple(f"{_PREFIX}{path}." for path in paths)
    # Whole embeddings of an enlarged vocabulary are what training started from, and tied.
    copies = {
        f"{_PREFIX}{path}.{infix}weight"
        for path in paths
        for infix in (("base_layer.",) if is_replaced(adapter, path) else ("", "base_layer."))
    }
    return any(name.startswith(stems) and name not in copies for name in adapter.tensors)


def _tie_equal_embeddings(model: Any, was_tied: bool) -> None:
    """Ties embeddings again that were trained tied; else makes the config say that they are not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not was_tied or head is None:
        return
    if head.weight is not embedding.weight and head.weight.equal(embedding.weight):
        head.weight = embedding.weight
    model.config.tie_word_embeddings = head.weight is embedding.weight


def _merge_layer(layer: Any) -> float:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None:
        raise MergeError(f"{type(layer).__name__} has no single weight to merge into")
    before = weight.detach().clone()
    layer.merge(safe_merge=True)
    return relative_change(before, layer.get_base_layer().weight)


def _replacement_change(wrapper: Any) -> float:
    (name,) = wrapper.active_adapters
    new = dict(wrapper.modules_to_save[name].named_parameters())
    old = dict(wrapper.original_module.named_parameters())
    return max(relative_change(old[key], new[key]) for key in old)


def _tokens_change(wrapper: Any) -> float:
    layer = wrapper.token_adapter
    new = layer.get_merged_weights(layer.active_adapters)
    return relative_change(layer.get_base_layer().weight, new)


def relative_change(before: Any, after: Any) -> float:
    size = float(before.norm())
    change = float((after - before).norm())
    return change / size if size else change
