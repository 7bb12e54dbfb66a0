"""Several adapters into one, and one into a smaller one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from pydantic import BaseModel, ConfigDict

from qlora_serve.adapters.files import AdapterFiles, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.manifest import Manifest, ManifestBase, package_versions
from qlora_serve.adapters.weights import AdapterWeights, LoraPair, load_weights
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, ConfigError, MergeError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.merge.config import CombineSettings, FoldSettings
from qlora_serve.merge.lowrank import truncate_matrix, truncate_product
from qlora_serve.merge.new_adapter import NewAdapter, write_adapter
from qlora_serve.progress import progress

_PRUNING = ("ties", "dare_linear", "dare_ties")
_PROBES = 8


class NewAdapterReport(BaseModel):
    """What `combine`, `fold` and `extract` print with --json."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    output: str
    """The new adapter's directory."""
    identity: str
    """See `adapters.identity.content_identity`."""
    ranks: dict[str, int]
    """Module → rank."""
    errors: dict[str, float]
    """Module → ‖exact update - new update‖ / ‖exact update‖; empty where nothing was cut off."""
    error: float
    """The same over all modules together."""
    kept_energy: float
    """The share of the updates' squared norm that the new adapter holds: 1 - error²."""


@dataclass(frozen=True)
class _Part:
    """One adapter of a combination."""

    files: AdapterFiles
    weights: AdapterWeights
    weight: float


def combine_adapters(settings: CombineSettings) -> NewAdapterReport:
    """Makes one adapter of several with weights, and publishes it.

    Raises:
        AdapterError: one of them is broken or does not fit the base.
        ConfigError: a weight is no number, or the method lacks its density.
        MergeError: they belong to different bases, or hold what has no sum.
        OutputError: the output holds something.
    """
    require_free_output(settings.output)
    _check_density(settings)
    named = [_split_weight(text) for text in settings.adapters]
    files = [read_adapter(path) for path, _ in named]
    source = adapter_base(files[0], settings.base)
    _check_one_base(files)
    fit = FitChecker(source)
    with progress("reading the adapters"):
        loaded = [load_weights(adapter, fit) for adapter in files]
        parts = [
            _Part(file, weights, weight)
            for file, weights, (_, weight) in zip(files, loaded, named, strict=True)
        ]
    for part in parts:
        _require_plain(part, "combined")
    pairs, errors = _combine_modules(parts, settings)
    recipe = {
        "made_by": "combine",
        "method": settings.method,
        "density": settings.density,
        "seed": settings.seed,
        "parts": [
            {"adapter": str(p.files.path), "identity": p.weights.identity, "weight": p.weight}
            for p in parts
        ],
    }
    new = NewAdapter(pairs, _manifest(files, source, recipe))
    return _publish(settings.output, new, source, errors)


def fold_adapter(settings: FoldSettings) -> NewAdapterReport:
    """Makes an adapter of a smaller rank that is as near to a given one as can be.

    Only updates are folded; DoRA's magnitudes, biases, replaced modules and trained tokens stay as
    they are.

    Raises:
        AdapterError: it is broken or does not fit its base.
        ConfigError: neither or both of rank and energy are given, or nothing gets smaller.
        OutputError: the output holds something.
    """
    if (settings.rank is None) == (settings.energy is None):
        raise ConfigError("expected one of --rank N and --energy SHARE")
    require_free_output(settings.output)
    files = read_adapter(settings.adapter)
    source = adapter_base(files, settings.base)
    weights = load_weights(files, FitChecker(source))
    if settings.rank is not None and settings.rank >= weights.max_rank:
        raise ConfigError(
            f"adapter {files.path} has the rank {weights.max_rank}; --rank {settings.rank} would "
            "not make it smaller"
        )
    pairs, errors = {}, {}
    with progress("folding modules", total=len(weights.modules)) as bar:
        for done, (path, pair) in enumerate(weights.modules.items(), start=1):
            cut = truncate_product(
                pair.b.float() * pair.scaling, pair.a.float(), settings.rank, settings.energy
            )
            # Scaling is in the factors now; the bias of B was scaled too.
            bias = None if pair.b_bias is None else pair.b_bias * pair.scaling
            pairs[path] = LoraPair(cut.a, cut.b, 1.0, pair.magnitude, bias, pair.is_embedding)
            errors[path] = (cut.lost, cut.energy)
            bar.update(done)
    kept = ("use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices")
    kept_settings = {key: files.config[key] for key in kept if files.config.get(key)}
    if files.config.get("ensure_weight_tying"):
        kept_settings["ensure_weight_tying"] = True
    others = {name: t for name, t in files.load_tensors().items() if ".lora_" not in name}
    recipe = {
        "made_by": "fold",
        "adapter": str(files.path),
        "identity": weights.identity,
        "rank": settings.rank,
        "energy": settings.energy,
    }
    new = NewAdapter(pairs, _manifest([files], source, recipe), others, kept_settings)
    return _publish(settings.output, new, source, errors)


def adapter_base(adapter: AdapterFiles, given: str | None) -> BaseSource:
    """The base of an adapter: shapes and names are needed of it, never a weight.

    Raises:
        MergeError: nobody knows it, or it is not here.
    """
    name = given or adapter.base_name
    if name is None:
        raise MergeError(
            f"adapter {adapter.path} does not say which base it was trained on; pass --base"
        )
    try:
        return locate_base(name)
    except BaseModelError as error:
        raise MergeError(
            f"the base {name!r} of adapter {adapter.path} cannot be used ({error}); pass --base"
        ) from None


def _publish(
    output: Path, new: NewAdapter, source: BaseSource, errors: dict[str, tuple[float, float]]
) -> NewAdapterReport:
    with published_directory(output) as staging:
        identity = write_adapter(staging, new, source)
    lost = sum(one for one, _ in errors.values())
    energy = sum(one for _, one in errors.values())
    share = lost / energy if energy else 0.0
    return NewAdapterReport(
        output=str(output),
        identity=identity,
        ranks={path: int(pair.a.shape[0]) for path, pair in new.pairs.items()},
        errors={path: sqrt(cut / all_) if all_ else 0.0 for path, (cut, all_) in errors.items()},
        error=sqrt(share),
        kept_energy=1 - share,
    )


def _combine_modules(
    parts: list[_Part], settings: CombineSettings
) -> tuple[dict[str, LoraPair], dict[str, tuple[float, float]]]:
    paths = sorted({path for part in parts for path in part.weights.modules})
    rank = settings.rank or max(part.weights.max_rank for part in parts)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(settings.seed)  # PEFT's dare draws from the global generator
    pairs, errors = {}, {}
    try:
        with progress("combining modules", total=len(paths)) as bar:
            for done, path in enumerate(paths, start=1):
                here = [
                    (part.weights.modules[path], part.weight)
                    for part in parts
                    if path in part.weights.modules
                ]
                pairs[path], cut = _combine(here, settings, rank, path)
                if cut is not None:
                    errors[path] = cut
                bar.update(done)
    finally:
        torch.random.set_rng_state(generator_state)
    return pairs, errors


def _combine(
    parts: Sequence[tuple[LoraPair, float]], settings: CombineSettings, rank: int, path: str
) -> tuple[LoraPair, tuple[float, float] | None]:
    method, is_embedding = settings.method, parts[0][0].is_embedding
    if method == "cat" or method == "svd":
        a = torch.cat([pair.a.float() * (weight * pair.scaling) for pair, weight in parts])
        b = torch.cat([pair.b.float() for pair, _ in parts], dim=1)
        if method == "cat":
            return LoraPair(a, b, 1.0, is_embedding=is_embedding), None
        cut = truncate_product(b, a, rank, None)
    elif method.endswith("_svd"):
        deltas = [pair.scaling * (pair.b.float() @ pair.a.float()) for pair, _ in parts]
        weights = torch.tensor([weight for _, weight in parts])
        merged = _mixer(method.removesuffix("_svd"), settings.density)(deltas, weights)
        cut = truncate_matrix(merged, rank, None)
    else:
        return _combine_factors(parts, settings, path), None
    return LoraPair(cut.a, cut.b, 1.0, is_embedding=is_embedding), (cut.lost, cut.energy)


def _combine_factors(
    parts: Sequence[tuple[LoraPair, float]], settings: CombineSettings, path: str
) -> LoraPair:
    """Mixes the A with the A and the B with the B, as PEFT does: cheap, and only near the sum."""
    ranks = sorted({int(pair.a.shape[0]) for pair, _ in parts})
    if len(ranks) > 1:
        instead = "svd" if settings.method == "linear" else f"{settings.method}_svd"
        raise MergeError(
            f"--method {settings.method} needs adapters of one rank, and those of {path} are "
            f"{' and '.join(map(str, ranks))}; use --method {instead}"
        )
    # Half of weight and scaling goes to each factor; a sign must not be squared away.
    scales = [weight * pair.scaling for pair, weight in parts]
    roots_b = torch.tensor([sqrt(abs(scale)) for scale in scales])
    roots_a = roots_b * torch.tensor([1.0 if scale >= 0 else -1.0 for scale in scales])
    mix = _mixer(settings.method, settings.density)
    a = mix([pair.a.float() for pair, _ in parts], roots_a)
    b = mix([pair.b.float() for pair, _ in parts], roots_b)
    return LoraPair(a, b, 1.0, is_embedding=parts[0][0].is_embedding)


def _mixer(method: str, density: float | None) -> Callable[[list[Any], Any], Any]:
    if method == "linear":
        return task_arithmetic
    chosen = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}[method]
    return lambda tensors, weights: chosen(tensors, weights, density)


def _check_density(settings: CombineSettings) -> None:
    needs = settings.method.removesuffix("_svd") in _PRUNING
    if needs and settings.density is None:
        raise ConfigError(f"--method {settings.method} needs --density, such as 0.5")
    if not needs and settings.density is not None:
        raise ConfigError(f"--density is for ties and dare; --method {settings.method} keeps all")
    if settings.rank is not None and not settings.method.endswith("svd"):
        raise ConfigError(f"--rank is for the svd methods; not for --method {settings.method}")


def _split_weight(text: str) -> tuple[Path, float]:
    path, separator, weight = text.rpartition("=")
    if not separator:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(
            f"{text!r}: expected DIR or DIR=WEIGHT with a number, like a=0.5"
        ) from None


def _check_one_base(files: list[AdapterFiles]) -> None:
    """Adapters of two bases have no common meaning, even where the shapes fit."""
    marks = {f.manifest.base.fingerprint: f for f in files if f.manifest is not None}
    if len(marks) > 1:
        one, other = list(marks.values())[:2]
        raise MergeError(
            f"{one.path} and {other.path} were trained on bases with different weights "
            f"({one.base_name}, {other.base_name}); only adapters of one base can be combined"
        )


def _require_plain(part: _Part, what: str) -> None:
    """Only updates `B A` have a sum."""
    weights = part.weights
    found = [
        ("DoRA's magnitudes", any(p.magnitude is not None for p in weights.modules.values())),
        ("a bias of B (lora_bias)", any(p.b_bias is not None for p in weights.modules.values())),
        ("biases (bias)", bool(weights.biases)),
        ("replaced modules (modules_to_save)", bool(weights.replaced)),
        ("trained tokens", bool(weights.token_rows)),
    ]
    names = [name for name, is_there in found if is_there]
    if names:
        raise MergeError(
            f"adapter {part.files.path} holds {' and '.join(names)}, which cannot be {what}; only "
            "low-rank updates can"
        )


def _manifest(files: list[AdapterFiles], source: BaseSource, recipe: dict[str, Any]) -> Manifest:
    recorded = [adapter.manifest for adapter in files if adapter.manifest is not None]
    if recorded:
        base = recorded[0].base
    else:
        base = ManifestBase(
            name=source.name,
            fingerprint=fingerprint(source),
            quantization=source.quantization,
            dtype="float32",
            unquantized=source.unquantized if source.quantization != "none" else source.name,
        )
    # Some prompts of each, so that merging the result is proven on what all of them learnt.
    share = max(1, _PROBES // max(1, len(recorded)))
    origins = {manifest.probes_from for manifest in recorded if manifest.probes}
    return Manifest(
        base=base,
        recipe=recipe,
        probes=[ids for manifest in recorded for ids in manifest.probes[:share]][:_PROBES],
        probes_from=origins.pop() if len(origins) == 1 else None,
        stop_token_ids=sorted({i for manifest in recorded for i in manifest.stop_token_ids}),
        versions=package_versions(),
    )
