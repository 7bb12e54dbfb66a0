"""An adapter's weights in the form that is applied: what it adds to or replaces in each module."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.fit import ExpectedAdapter, FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.peft_config import parse_config, unsupported_settings
from qlora_serve.adapters.vocabulary import take_bias, take_whole
from qlora_serve.errors import AdapterError
from qlora_serve.wording import counted

_PREFIX = "base_model.model."
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update of one layer: `W += scaling * B A` (arXiv:2106.09685).

    With a magnitude it is DoRA's (arXiv:2402.09353): the rows of `W + scaling * B A` are then
    brought to the lengths that the magnitude gives. An embedding counts as the linear layer of
    its one-hot inputs.
    """

    a: Any
    """[rank, in_features], or [rank, tokens of the vocabulary] of an embedding"""
    b: Any
    """[out_features, rank]"""
    scaling: float
    magnitude: Any = None
    """[out_features] of DoRA, else None"""
    b_bias: Any = None
    """[out_features], the bias of B (`lora_bias`), else None"""
    is_embedding: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        parts = (self.a, self.b, self.magnitude, self.b_bias)
        return sum(int(part.nbytes) for part in parts if part is not None)


@dataclass(frozen=True)
class TokenRows:
    """Some rows of an embedding, or of an output layer that is tied to it."""

    indices: tuple[int, ...]
    rows: Any
    """[len(indices), hidden]: the whole new rows"""


@dataclass(frozen=True)
class AdapterWeights:
    """All that the engine needs of an adapter, checked. Keys are paths in the base model."""

    identity: str
    """See `identity.content_identity`."""
    modules: Mapping[str, LoraPair]
    """A linear layer or an embedding → its update."""
    biases: Mapping[str, Any] = field(default_factory=dict)
    """Any module → its new bias (`bias`)."""
    replaced: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """A module → all its parameters, by name (`modules_to_save`)."""
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    """An embedding or output layer → new rows of its weight (`trainable_token_indices`)."""
    base_copies: Mapping[str, Any] = field(default_factory=dict)
    """A module → the base's own weight as the file repeats it; not to be applied, but the adapter
    only fits a base where it is the same."""

    vocabulary: int | None = None
    """The tokens that the adapter knows, where that is more than the base's. Both embeddings are
    then among `replaced`, with all that the adapter does to them in them."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that are applied."""
        others = [*self.biases.values(), *(rows.rows for rows in self.token_rows.values())]
        others += [part for parts in self.replaced.values() for part in parts.values()]
        return sum(pair.size_bytes for pair in self.modules.values()) + sum(
            int(tensor.nbytes) for tensor in others
        )

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max((pair.a.shape[0] for pair in self.modules.values()), default=0)

    @property
    def is_dead(self) -> bool:
        """Whether every update is exactly zero, as right after initialisation.

        Magnitudes, biases and replaced modules count as alive: only the base could tell.
        """
        if self.biases or self.replaced or self.token_rows:
            return False
        return all(_is_zero(pair) for pair in self.modules.values())


def load_weights(adapter: AdapterFiles, fit: FitChecker) -> AdapterWeights:
    """Reads and checks an adapter for a base: right, or refused.

    Raises:
        AdapterError: it does not fit the base, asks for what cannot be applied exactly, or holds
            NaN or infinite values.
    """
    expected = check_settings_and_fit(adapter, fit)
    tensors = adapter.load_tensors()
    check_finite(adapter, tensors)
    rest = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    enlarged = {}
    if expected.vocabulary is not None:
        enlarged = take_whole(adapter, rest, fit.embeddings, expected.saved_modules)
    modules = {
        name: _take_pair(adapter, rest, name, module.scaling)
        for name, module in expected.modules.items()
    }
    token_rows = _take_token_rows(rest, expected)
    largest = max((max(tokens.indices) for tokens in token_rows.values()), default=0)
    known = expected.vocabulary or fit.embeddings.rows
    if largest >= known:
        raise AdapterError(
            f"adapter {adapter.path} trains token {largest}, and the base has {known}; save it "
            "again with PEFT's save_embedding_layers=True"
        )
    with_own = {
        name: {"weight": _with_updates(weight, modules.pop(name, None), token_rows.pop(name, None))}
        | take_bias(rest, name)
        for name, weight in enlarged.items()
    }
    return AdapterWeights(
        content_identity(adapter, tensors),
        modules,
        replaced=_take_replaced(adapter, rest, expected) | with_own,
        token_rows=token_rows,
        base_copies=_take(rest, ".base_layer.weight"),
        biases=_take_biases(adapter, rest),
        vocabulary=expected.vocabulary,
    )


def check_settings_and_fit(adapter: AdapterFiles, fit: FitChecker) -> ExpectedAdapter:
    """Checks all of an adapter that can be checked without its weights.

    Raises:
        AdapterError: it does not fit the base, or asks for what cannot be applied exactly.
    """
    parse_config(adapter.config)  # before the fit: settings say more clearly what is wrong
    reasons = unsupported_settings(adapter.config)
    if reasons:
        raise AdapterError(
            f"adapter {adapter.path} needs what the engine cannot apply: {', '.join(reasons)}"
        )
    return fit.check(adapter)


def check_finite(adapter: AdapterFiles, tensors: Mapping[str, Any]) -> None:
    """Raises:
    AdapterError: a tensor holds NaN or an infinity; the first three are named.
    """
    # One sum each, which no NaN or infinity leaves finite; the rare sum of large numbers that is
    # not finite either is looked at again.
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    totals = [float(tensor.sum()) for tensor in floats.values()]
    suspects = [name for name, total in zip(floats, totals, strict=True) if not isfinite(total)]
    bad = sorted(name for name in suspects if not bool(tensors[name].isfinite().all()))
    if bad:
        raise AdapterError(
            f"adapter {adapter.path} holds NaN or infinite values in "
            f"{counted(len(bad), 'tensor', 'tensors')} ({', '.join(bad[:3])}); its training "
            "diverged"
        )


def _take_pair(adapter: AdapterFiles, rest: dict[str, Any], name: str, scaling: float) -> LoraPair:
    """Takes a module's LoRA tensors out of `rest`."""
    a, b = rest.pop(f"{name}.lora_A.weight", None), rest.pop(f"{name}.lora_B.weight", None)
    is_embedding = a is None or b is None
    if is_embedding:
        a = rest.pop(f"{name}.lora_embedding_A", None)
        b = rest.pop(f"{name}.lora_embedding_B", None)
    if a is None or b is None or a.ndim != 2:
        raise AdapterError(
            f"adapter {adapter.path} targets {name}, which is neither a linear layer nor an "
            "embedding; the engine applies LoRA to these only"
        )
    magnitude = rest.pop(f"{name}.lora_magnitude_vector", None)
    b_bias = rest.pop(f"{name}.lora_B.bias", None)
    return LoraPair(a, b, scaling, magnitude, b_bias, is_embedding)


def _with_updates(weight: Any, pair: LoraPair | None, tokens: TokenRows | None) -> Any:
    """An embedding or output layer [vocabulary, hidden] with its updates in it.

    The adapter has a copy of its own anyway, so that a low-rank update beside it would only cost.
    """
    if tokens is not None:
        weight = weight.clone()
        weight[list(tokens.indices)] = tokens.rows.to(weight.dtype)
    if pair is None:
        return weight
    if pair.b_bias is not None:
        raise AdapterError(
            "the adapter has an enlarged vocabulary and lora_bias on an embedding or output layer; "
            "the engine applies one of them only"
        )
    whole = weight.float().t() if pair.is_embedding else weight.float()
    whole = whole + pair.b.float() @ pair.a.float() * pair.scaling
    if pair.magnitude is not None:
        whole = whole * (pair.magnitude.float() / whole.norm(dim=1))[:, None]
    return whole.t().contiguous() if pair.is_embedding else whole


def _take_replaced(
    adapter: AdapterFiles, rest: dict[str, Any], expected: ExpectedAdapter
) -> dict[str, dict[str, Any]]:
    """Takes the parameters of `modules_to_save` out of `rest`."""
    replaced: dict[str, dict[str, Any]] = {}
    for name in sorted(expected.saved_modules):
        # With bias="all", PEFT also saves biases under its own names for the module and its copy,
        # and does not read them back.
        unused = (f"{name}.original_module.", f"{name}.modules_to_save.")
        for key in [key for key in rest if key.startswith(unused)]:
            del rest[key]
        stem = f"{name}."
        parts = {
            key.removeprefix(stem): rest.pop(key) for key in list(rest) if key.startswith(stem)
        }
        if parts:  # else the module has no parameters, and its copy does the same
            replaced[name] = parts
        if not parts.keys() <= {"weight", "bias"}:
            raise AdapterError(
                f"adapter {adapter.path} replaces {name} whole (modules_to_save), which is more "
                "than one layer; the engine replaces linear layers, embeddings and norms"
            )
    return replaced


def _take_token_rows(rest: dict[str, Any], expected: ExpectedAdapter) -> dict[str, TokenRows]:
    """Takes the rows of `trainable_token_indices` out of `rest`."""
    rows = _take(rest, _TOKEN_ROWS)
    return {
        name: TokenRows(module.indices, rows[module.source])
        for name, module in expected.token_rows.items()
    }


def _take_biases(adapter: AdapterFiles, rest: dict[str, Any]) -> dict[str, Any]:
    """Takes the biases, which must be all that is left of `rest`."""
    biases = _take(rest, ".base_layer.bias") | _take(rest, ".bias")
    if rest:
        raise AdapterError(
            f"adapter {adapter.path} holds {sorted(rest)[0]}, which the engine does not apply"
        )
    return biases


def _take(rest: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Takes every tensor with a suffix out of `rest`: module → tensor."""
    return {key.removesuffix(suffix): rest.pop(key) for key in list(rest) if key.endswith(suffix)}


def _is_zero(pair: LoraPair) -> bool:
    has_bias = pair.b_bias is not None and bool(pair.b_bias.any())
    if pair.magnitude is not None or has_bias:
        return False
    return pair.scaling == 0 or not pair.b.any() or not pair.a.any()
