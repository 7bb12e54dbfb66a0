"""Does an adapter fit a base? PEFT itself is asked, on a model without weights."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.peft_config import parse_config
from qlora_serve.adapters.shortage import is_shortage
from qlora_serve.adapters.vocabulary import (
    Embeddings,
    enlarged_vocabulary,
    find_embeddings,
    is_whole_embedding,
)
from qlora_serve.base.gptq import no_gptq_layers
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import AdapterError
from qlora_serve.wording import counted

_PREFIX = "base_model.model."
_LISTED = 3
_ABOUT_ORIGIN = frozenset({"base_model_name_or_path", "revision", "peft_version"})


@dataclass(frozen=True)
class ModuleFit:
    """What PEFT makes of one target module."""

    rank: int
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""


@dataclass(frozen=True)
class TokenRowsFit:
    """What PEFT makes of one module with trainable tokens."""

    indices: tuple[int, ...]
    source: str
    """The path of the module under which the rows are saved: another one where weights are tied."""


@dataclass(frozen=True)
class ExpectedAdapter:
    """What PEFT would save for a config on a base."""

    shapes: dict[str, tuple[int, ...]]
    """Every tensor's name and shape."""
    modules: dict[str, ModuleFit]
    """Every target module's path in the base model."""
    saved_modules: frozenset[str]
    """Paths of the modules that the adapter replaces whole (`modules_to_save`)."""
    token_rows: dict[str, TokenRowsFit]
    """Modules of whose weight the adapter replaces rows (`trainable_token_indices`)."""
    optional: frozenset[str] = frozenset()
    """Tensors that PEFT saves beside an enlarged vocabulary, or not: whole embeddings."""
    vocabulary: int | None = None
    """The tokens of the enlarged vocabulary that the adapter was trained with, if it was."""


class FitChecker:
    """Checks adapters against one base; remembers what PEFT answered for each config.

    Args:
        source: the base.
        vocabulary: the rows of its embeddings once they are enlarged, for an adapter that was
            trained so; by default what the adapter's own embeddings say.
    """

    def __init__(self, source: BaseSource, vocabulary: int | None = None) -> None:
        self.source = source
        self.vocabulary = vocabulary
        self._answers: dict[str, ExpectedAdapter] = {}
        self._lock = Lock()  # adapters may be checked from several threads

    def expected(self, adapter: AdapterFiles) -> ExpectedAdapter:
        """What PEFT would save for this adapter's config on this base.

        Raises:
            AdapterError: the config cannot be used, or matches no module of the base.
        """
        vocabulary = self.vocabulary or enlarged_vocabulary(adapter, self.embeddings)
        key = f"{vocabulary} {_question(adapter.config)}"
        with self._lock:
            if key not in self._answers:
                self._answers[key] = _ask_peft(self.source, adapter, vocabulary)
            return self._answers[key]

    @cached_property
    def embeddings(self) -> Embeddings:
        """Where the base has its embeddings."""
        return find_embeddings(self.source)

    def check(self, adapter: AdapterFiles) -> ExpectedAdapter:
        """Checks that every expected tensor is there, in its shape, and no other.

        Raises:
            AdapterError: with up to three tensors of each kind that do not fit.
        """
        expected = self.expected(adapter)
        found = {name: info.shape for name, info in adapter.tensors.items()}
        # PEFT may save a copy of the base's own embedding beside an embedding LoRA, or not.
        has_biases = adapter.config.get("bias") not in (None, "none")
        needed = {name for name in expected.shapes if not _is_base_copy(name, has_biases)}
        needed -= expected.optional
        missing = sorted(needed - found.keys())
        extra = sorted(found.keys() - expected.shapes.keys())
        if expected.vocabulary is not None:
            missing = [name for name in missing if not is_whole_embedding(name, self.embeddings)]
            rows = expected.vocabulary
            extra = [
                name
                for name in extra
                if found[name][0] != rows or not is_whole_embedding(name, self.embeddings)
            ]
        wrong = sorted(
            n for n in expected.shapes.keys() & found.keys() if found[n] != expected.shapes[n]
        )
        problems = []
        if missing:
            problems.append(f"{_tensors(missing, 'is', 'are')} missing ({_some(missing)})")
        if extra:
            which = _tensors(extra, "matches", "match")
            problems.append(f"{which} nothing in this base ({_some(extra)})")
        if wrong:
            shapes = (f"{n} is {_x(found[n])}, expected {_x(expected.shapes[n])}" for n in wrong)
            problems.append(f"{_tensors(wrong, 'has', 'have')} another shape ({_some(shapes)})")
        tokens = _other_vocabulary(found, [*extra, *wrong])
        if tokens is not None:
            problems.insert(0, f"its vocabulary has {tokens} tokens, the base's another number")
        if problems:
            trained_on = f", trained on {adapter.base_name!r}," if adapter.base_name else ""
            raise AdapterError(
                f"adapter {adapter.path}{trained_on} does not fit the base "
                f"{self.source.display_name!r}: {'; '.join(problems)}"
            )
        return expected


def _question(config: Mapping[str, Any]) -> str:
    """The same text for configs of which PEFT makes the same.

    PEFT writes sets in an order that differs from run to run.
    """
    unordered = {
        name: sorted(value) if isinstance(value, list) and _is_text(value) else value
        for name, value in config.items()
        if name not in _ABOUT_ORIGIN
    }
    return json.dumps(unordered, sort_keys=True, default=str)


def _is_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _ask_peft(source: BaseSource, adapter: AdapterFiles, vocabulary: int | None) -> ExpectedAdapter:
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    config = parse_config(adapter.config)
    config.inference_mode = True
    skeleton = build_skeleton(source, vocabulary)
    try:
        with warnings.catch_warnings(), no_gptq_layers():
            warnings.simplefilter("ignore")  # about tied embeddings: `merge` deals with them
            model: Any = get_peft_model(skeleton, config)
            state = get_peft_model_state_dict(model)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        if is_shortage(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(
            f"adapter {adapter.path} cannot be put on the base {source.display_name!r}: {reason}"
        ) from None
    named = {name.removeprefix(_PREFIX): module for name, module in model.named_modules()}
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    whole = _whole_embeddings(model) if vocabulary is not None else {}
    return ExpectedAdapter(
        shapes=whole | shapes,
        vocabulary=vocabulary,
        optional=frozenset(whole.keys() - shapes.keys()),
        modules={
            name: ModuleFit(layer.r["default"], float(layer.scaling["default"]))
            for name, layer in named.items()
            if isinstance(layer, LoraLayer) and "default" in layer.r
        },
        saved_modules=frozenset(
            name for name, module in named.items() if isinstance(module, ModulesToSaveWrapper)
        ),
        token_rows=_token_rows(named),
    )


def _whole_embeddings(model: Any) -> dict[str, tuple[int, ...]]:
    """The embedding matrices under the names that PEFT gives them when it saves them whole."""
    inside = model.get_base_model()
    layers = [inside.get_input_embeddings(), inside.get_output_embeddings()]
    found = {}
    for name, module in model.named_modules():
        if any(module is layer for layer in layers):
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            infix = "base_layer." if base is not module else ""
            if getattr(base, "weight", None) is not None:
                found[f"{name}.{infix}weight"] = tuple(base.weight.shape)
    return found


def _token_rows(named: dict[str, Any]) -> dict[str, TokenRowsFit]:
    from peft.utils.other import TrainableTokensWrapper

    rows = {}
    for name, module in named.items():
        if not isinstance(module, TrainableTokensWrapper):
            continue
        layer = module.token_adapter
        tied = layer.tied_adapter
        source = name
        if tied is not None:
            source = next(other for other, m in named.items() if m is tied)
            source = source.removesuffix(".token_adapter")
        indices = (tied or layer).token_indices["default"]
        rows[name] = TokenRowsFit(tuple(int(index) for index in indices), source)
    return rows


def _is_base_copy(name: str, has_biases: bool) -> bool:
    """Whether a tensor only repeats the base's own weights."""
    return name.endswith(".base_layer.weight") or (
        name.endswith(".base_layer.bias") and not has_biases
    )


def _other_vocabulary(found: dict[str, tuple[int, ...]], names: list[str]) -> int | None:
    """The tokens of a whole embedding among tensors that do not fit, if there is one."""
    for name in names:
        is_embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if is_embedding or name.endswith(".base_layer.weight"):
            return found[name][0]
    return None


def _tensors(names: list[str], one: str, many: str) -> str:
    return counted(len(names), f"tensor {one}", f"tensors {many}")


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    tail = ", ..." if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + tail


def _x(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
