"""All that a server checks when it loads an adapter, and what a person would want to know."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_serve.adapters.compare import (
    compare_layers,
    compare_others,
    compare_settings,
    dead_modules,
    layer_norms,
)
from qlora_serve.adapters.files import AdapterFiles, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.folder import OBJECT_KEY
from qlora_serve.adapters.weights import AdapterWeights, load_weights
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import AdapterError, BaseModelError


def check_adapter(directory: Path, base: str | None = None) -> dict[str, Any]:
    """Checks an adapter against a base, as `adapters check --json` prints it.

    Args:
        directory: the adapter.
        base: the base to check against; the adapter's own when left out.

    Raises:
        AdapterError: a server would refuse it, or a store's content is not what it was.
        BaseModelError: there is no such base.
    """
    adapter, source, weights = _load(directory, base)
    dead = dead_modules(weights)
    warnings = []
    if weights.is_dead:
        warnings.append("every update is zero: this adapter answers exactly as the base does")
    elif dead:
        warnings.append(
            f"the update of {len(dead)} of {len(weights.modules)} modules is zero, first {dead[0]}"
        )
    other = _other_weights(adapter, source)
    if other is not None:
        warnings.append(other)
    return {
        "ok": True,
        "base": source.display_name,
        "identity": weights.identity,
        "modules": len(weights.modules),
        "max_rank": weights.max_rank,
        "dead_modules": dead,
        "warnings": warnings,
        "layer_norms": layer_norms(weights),
    }


def compare_adapters(first: Path, second: Path, base: str | None = None) -> dict[str, Any]:
    """Compares two adapters that fit the same base.

    Raises:
        AdapterError: one of them does not fit it.
        BaseModelError: there is no such base.
    """
    one, source, first_weights = _load(first, base)
    two = read_adapter(second)
    second_weights = load_weights(two, FitChecker(source))
    layers = compare_layers(first_weights, second_weights)
    return {
        "identical": first_weights.identity == second_weights.identity,
        "identities": [first_weights.identity, second_weights.identity],
        "settings": {name: list(pair) for name, pair in compare_settings(one, two).items()},
        "layers": {layer: asdict(comparison) for layer, comparison in layers.items()},
        "others": compare_others(first_weights, second_weights),
    }


def _load(directory: Path, base: str | None) -> tuple[AdapterFiles, BaseSource, AdapterWeights]:
    adapter = read_adapter(directory)
    source = _locate(adapter, base)
    weights = load_weights(adapter, FitChecker(source))
    key = adapter.path.name
    if OBJECT_KEY.fullmatch(key) and weights.identity != f"sha256:{key[:64]}":
        raise AdapterError(
            f"adapter {directory} is damaged: its content in the store has changed since it was "
            f"added; remove it with `qlora-serve adapters remove`, run `qlora-serve adapters clean "
            "--now`, and add it again"
        )
    return adapter, source, weights


def _locate(adapter: AdapterFiles, base: str | None) -> BaseSource:
    if base is not None:
        return locate_base(base)
    if adapter.base_name is None:
        raise AdapterError(
            f"adapter {adapter.path} does not say which base it was trained on; pass --base"
        )
    try:
        return locate_base(adapter.base_name)
    except BaseModelError as error:
        raise AdapterError(
            f"the base of adapter {adapter.path} is not here ({error}); pass --base with where it "
            "is now"
        ) from None


def _other_weights(adapter: AdapterFiles, source: BaseSource) -> str | None:
    if adapter.manifest is None:
        return None
    trained_on = adapter.manifest.base
    if trained_on.fingerprint in (fingerprint(source), source.unquantized_fingerprint):
        return None
    return (
        f"{source.display_name} does not hold the weights that the adapter was trained on "
        f"({trained_on.name}); answers are only right if it is the same model in another dtype or "
        "quantization"
    )
