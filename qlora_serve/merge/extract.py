"""An adapter from a full fine-tune and its base: what changed, at a small rank."""

import gc
from pathlib import Path
from typing import Any

import torch

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.manifest import Manifest, ManifestBase, package_versions
from qlora_serve.adapters.weights import LoraPair
from qlora_serve.base.identity import fingerprint
from qlora_serve.base.load import load_base
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.base.tokenizer import load_tokenizer
from qlora_serve.errors import ConfigError, MergeError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.merge.bake import attach_adapter
from qlora_serve.merge.combine import NewAdapterReport
from qlora_serve.merge.config import ExtractSettings
from qlora_serve.merge.lowrank import Truncated, truncate_matrix
from qlora_serve.merge.new_adapter import NewAdapter, write_adapter
from qlora_serve.merge.proof import Answers, Comparison, ask, choose_probes, compare
from qlora_serve.merge.tensor_files import TORCH_DTYPES, StoredTensor, stored_tensors
from qlora_serve.progress import progress
from qlora_serve.wording import counted

_PREFIX = "base_model.model."


class ExtractReport(NewAdapterReport):
    """What `extract --json` prints."""

    saved_whole: list[str]
    """Modules that the adapter replaces whole."""
    adapter_against_model: Comparison
    """Base and adapter against the fine-tuned model."""
    base_against_model: Comparison
    """The base alone against it, to compare with."""


def extract_adapter(settings: ExtractSettings) -> ExtractReport:
    """Approximates `fine-tuned - base` by one low-rank update for each linear layer.

    Raises:
        ConfigError: both rank and energy are given.
        MergeError: the two are not the same architecture, nothing changed, or what changed is no
            linear layer's weight.
        OutputError: the output holds something.
    """
    if settings.rank is not None and settings.energy is not None:
        raise ConfigError("expected one of --rank N and --energy SHARE, not both")
    require_free_output(settings.output)
    tuned, base = _unquantized(settings.model), _unquantized(settings.base)
    energy = settings.energy or 0.9
    changed = _changed_tensors(tuned, base)
    linear, others = _split_linear(changed, base)
    if others and not settings.save_others:
        raise MergeError(
            f"{settings.model} also differs from {settings.base} in "
            f"{counted(len(others), 'tensor', 'tensors')} that no low-rank update can hold "
            f"({', '.join(sorted(others)[:3])}); pass --save-others to "
            "store them whole in the adapter"
        )
    cuts: dict[str, Truncated] = {}
    with progress("decomposing changes", total=len(linear)) as bar:
        for done, (path, (new, old)) in enumerate(linear.items(), start=1):
            matrix = new.whole().float() - old.whole().float()
            cuts[path] = truncate_matrix(matrix, settings.rank, energy)
            bar.update(done)
    new_adapter = _assemble(settings, base, cuts, others, tuned)
    with published_directory(settings.output) as staging:
        identity = write_adapter(staging, new_adapter, base)
        nearness, effect = _prove(settings, staging, base, tuned)
    lost, total = (sum(getattr(c, part) for c in cuts.values()) for part in ("lost", "energy"))
    share = lost / total if total else 0.0
    return ExtractReport(
        output=str(settings.output),
        identity=identity,
        ranks={path: int(cut.a.shape[0]) for path, cut in cuts.items()},
        errors={path: cut.error for path, cut in cuts.items()},
        error=share**0.5,
        kept_energy=1 - share,
        saved_whole=sorted(_modules(others)),
        adapter_against_model=nearness,
        base_against_model=effect,
    )


def _unquantized(name: str) -> BaseSource:
    source = locate_base(name)
    if source.quantization != "none":
        raise MergeError(
            f"{name} is quantized ({source.quantization}), and its rounding would be extracted "
            "too; expected unquantized models"
        )
    return source


def _changed_tensors(
    tuned: BaseSource, base: BaseSource
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Every tensor that differs: name → (fine-tuned, base)."""
    new, old = stored_tensors(tuned), stored_tensors(base)
    missing = sorted(new.keys() ^ old.keys())
    wrong = sorted(n for n in new.keys() & old.keys() if new[n].shape != old[n].shape)
    if tuned.model_type != base.model_type or missing or wrong:
        example = f"; {(missing + wrong)[0]} fits only one of them" if missing or wrong else ""
        raise MergeError(
            f"{tuned.name} ({tuned.model_type}) is not a fine-tune of {base.name} "
            f"({base.model_type}){example}"
        )
    odd = [n for n in old if {old[n].dtype, new[n].dtype} - TORCH_DTYPES.keys()]
    if odd:
        raise MergeError(f"{odd[0]} is stored as {new[odd[0]].dtype}; expected F32, F16 or BF16")
    changed = {}
    with progress("comparing weights", total=len(old)) as bar:
        for done, name in enumerate(sorted(old), start=1):
            if not _equal(new[name], old[name]):
                changed[name] = (new[name], old[name])
            bar.update(done)
    if not changed:
        raise MergeError(f"{tuned.name} and {base.name} hold the same weights: nothing to extract")
    return changed


def _equal(new: StoredTensor, old: StoredTensor) -> bool:
    pairs = zip(new.rows(), old.rows(), strict=True)
    return all(one.float().equal(other.float()) for (_, one), (_, other) in pairs)


def _split_linear(
    changed: dict[str, tuple[StoredTensor, StoredTensor]], base: BaseSource
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """Weights of linear layers inside the blocks by module, and all other changed tensors."""
    skeleton = build_skeleton(base)
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    inner = {
        f"{path}.weight": path
        for path, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(module is end for end in ends)
    }
    linear = {inner[name]: pair for name, pair in changed.items() if name in inner}
    return linear, {name: new for name, (new, _) in changed.items() if name not in inner}


def _modules(names: Any) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _assemble(
    settings: ExtractSettings,
    base: BaseSource,
    cuts: dict[str, Truncated],
    others: dict[str, StoredTensor],
    tuned: BaseSource,
) -> NewAdapter:
    biased = sorted(_modules(others) & cuts.keys())
    if biased:
        raise MergeError(
            f"weight and bias of {biased[0]} changed; an adapter holds either an update of the "
            "weight or the whole layer"
        )
    if not cuts:
        raise MergeError(
            f"{tuned.name} differs from {base.name} in no linear layer inside its blocks; there "
            "is no low-rank update to extract"
        )
    stored = stored_tensors(tuned)
    saved = _modules(others)
    # A replaced module is stored with all its parameters, changed or not.
    whole = {
        f"{_PREFIX}{name}": tensor.whole()
        for name, tensor in stored.items()
        if name.rpartition(".")[0] in saved
    }
    extra: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    embedding, head = _ends(base)
    if embedding in saved and head is not None:
        # Tied: PEFT saves the one matrix under both names.
        extra["ensure_weight_tying"] = True
        whole[f"{_PREFIX}{head}.weight"] = stored[f"{embedding}.weight"].whole()
    manifest = Manifest(
        base=ManifestBase(
            name=base.name,
            fingerprint=fingerprint(base),
            quantization="none",
            dtype="float32",
            unquantized=base.name,
        ),
        recipe={
            "made_by": "extract",
            "model": tuned.name,
            "rank": settings.rank,
            "energy": None if settings.rank is not None else settings.energy or 0.9,
        },
        versions=package_versions(),
    )
    pairs = {path: LoraPair(cut.a, cut.b, 1.0) for path, cut in cuts.items()}
    return NewAdapter(pairs, manifest, whole, extra)


def _ends(base: BaseSource) -> tuple[str, str | None]:
    """The paths of the embedding, and of the output layer where that is tied to it."""
    skeleton = build_skeleton(base)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    paths = {id(module): name for name, module in skeleton.named_modules()}
    is_tied = head is not None and head.weight is embedding.weight
    return paths[id(embedding)], paths[id(head)] if is_tied else None


def _prove(
    settings: ExtractSettings, staging: Path, base: BaseSource, tuned: BaseSource
) -> tuple[Comparison, Comparison]:
    """Base and adapter, and the base alone, against the fine-tuned model; one in memory at once."""

    adapter = read_adapter(staging)
    vocabulary = int(build_skeleton(base).get_input_embeddings().weight.shape[0])
    probes = choose_probes(adapter, load_tokenizer(base), vocabulary)

    def answers(title: str, source: BaseSource, is_adapted: bool) -> Answers:
        loaded = load_base(str(source.path), dtype="float32", device=settings.device)
        model = attach_adapter(loaded.model, adapter) if is_adapted else loaded.model
        with progress(f"asking {title}", total=len(probes.token_ids)) as bar:
            return ask(model, probes, sorted(loaded.stop_token_ids), bar.update)

    expected = answers("the fine-tuned model", tuned, False)
    gc.collect()
    plain = answers("the base", base, False)
    gc.collect()
    adapted = answers("base and adapter", base, True)
    nearness, effect = compare(expected, adapted), compare(expected, plain)
    if not nearness.mean_kl < effect.mean_kl:
        raise MergeError(
            f"base and adapter are no nearer to {tuned.name} (KL {nearness.mean_kl:.3g}) than the "
            f"base alone (KL {effect.mean_kl:.3g}); raise --rank or --energy"
        )
    return nearness, effect
