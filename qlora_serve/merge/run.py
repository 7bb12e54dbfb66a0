"""The flow of a merge: base and adapter are asked, baked, written, read again and compared."""

import gc
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import AdapterFiles, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import package_versions
from qlora_serve.adapters.peft_config import base_changing_start
from qlora_serve.adapters.weights import check_finite
from qlora_serve.base.load import LoadedBase, Quantization, load_base
from qlora_serve.errors import MergeError, QloraServeError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.merge.bake import attach_adapter, bake, count_layers
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.export import cast_weights, require_space, write_model
from qlora_serve.merge.proof import (
    Answers,
    Comparison,
    Probes,
    ask,
    choose_probes,
    compare,
    follow,
    judge,
)
from qlora_serve.merge.report import MergeReport, write_report
from qlora_serve.merge.sources import MergeBase, choose_base, stored_dtype
from qlora_serve.progress import progress

# Below these an adapter changes nothing but the last bit of a float32.
_DEAD_WEIGHT_CHANGE = 1e-6
_DEAD_LOGIT_CHANGE = 1e-5


@dataclass(frozen=True)
class _Job:
    """What is merged with what; fixed before any weight of the base is loaded."""

    settings: MergeSettings
    adapter: AdapterFiles
    identity: str
    base: MergeBase
    dtype: str


@dataclass(frozen=True)
class _Merged:
    """What writing and proving need to know of a merged model."""

    tokenizer: Any
    stop_token_ids: list[int]
    probes: Probes
    changes: dict[str, float]
    is_untied: bool
    expected: Answers
    """What base and adapter answer."""
    effect: Comparison
    """The base alone against base and adapter."""


def merge_adapter(settings: MergeSettings) -> MergeReport:
    """Merges an adapter into its unquantized base and publishes the result if it is proven.

    Raises:
        AdapterError: the adapter is broken or does not fit the base.
        BaseModelError: the base cannot be loaded.
        MergeError: there is no right base, the adapter changes nothing, or the merged model does
            not answer as the adapter does.
        OutputError: the output holds something, or the disk is full.
    """
    job = _prepare(settings)
    model, merged = _merge(job)
    with published_directory(settings.output) as staging:
        _write(job, model, merged, staging)
        del model  # one model in memory at a time
        gc.collect()
        report = _prove(job, merged, staging)
        write_report(staging, report)
    return report


def _prepare(settings: MergeSettings) -> _Job:
    """All the checks that cost no minute."""
    require_free_output(settings.output)
    adapter = read_adapter(settings.adapter)
    start = base_changing_start(adapter.config)
    if start is not None:
        raise MergeError(
            f"adapter {adapter.path} was started with init_lora_weights={start!r}, which changes "
            "the base; save it converted to plain LoRA (PEFT: path_initial_model_for_weight_"
            "conversion)"
        )
    base = choose_base(adapter, settings.base, settings.allow_base_mismatch)
    with progress("checking that the adapter fits its base"):
        FitChecker(base.source).check(adapter)
        tensors = adapter.load_tensors()
        check_finite(adapter, tensors)
        identity = content_identity(adapter, tensors)
    return _Job(settings, adapter, identity, base, settings.dtype or stored_dtype(base.source))


def _merge(job: _Job) -> tuple[Any, _Merged]:
    with progress(f"loading {job.base.source.display_name} in float32"):
        base = load_base(str(job.base.source.path), dtype="float32", device=job.settings.device)
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    probes = choose_probes(job.adapter, base.tokenizer, vocabulary)
    stops = _stop_token_ids(job, base)
    base_answers = _ask("asking the base", base.model, probes, stops)
    peft_model = attach_adapter(base.model, job.adapter)
    expected = _ask("asking base and adapter", peft_model, probes, stops)
    effect = compare(expected, base_answers)
    layers = count_layers(peft_model)
    with progress("merging layers", total=layers) as bar:
        baked = bake(peft_model, bar.update)
    _require_change(job, baked.changes, effect)
    merged = _Merged(
        base.tokenizer, stops, probes, baked.changes, baked.is_untied, expected, effect
    )
    return baked.model, merged


def _write(job: _Job, model: Any, merged: _Merged, staging: Path) -> None:
    with progress(f"writing {job.dtype} weights"):
        require_space(staging, model, job.dtype)
        cast_weights(model, job.dtype)
        shard_size = job.settings.max_shard_size
        write_model(staging, model, merged.tokenizer, merged.stop_token_ids, shard_size)


def _prove(job: _Job, merged: _Merged, staging: Path) -> MergeReport:
    tolerance = job.settings.tolerance_for(job.dtype)
    got = _ask_written(job, merged, staging)
    result = compare(merged.expected, got)
    judge(result, merged.effect, tolerance, job.dtype)
    cost, note = _cost_of_merging(job, merged, got)
    manifest = job.adapter.manifest
    return MergeReport(
        adapter=str(job.adapter.path),
        adapter_identity=job.identity,
        base=job.base.source.name,
        base_fingerprint=job.base.fingerprint,
        base_match=job.base.match,
        base_match_reason=job.base.reason,
        trained_on=manifest.base.quantization if manifest is not None else "unknown",
        dtype=job.dtype,
        tolerance=tolerance,
        changed_modules=merged.changes,
        untied_embeddings=merged.is_untied,
        stop_token_ids=merged.stop_token_ids,
        probes=len(merged.probes.token_ids),
        probes_origin=merged.probes.origin,
        merged_against_adapter=result,
        base_against_adapter=merged.effect,
        merged_against_quantized=cost,
        merged_against_quantized_note=note,
        versions=package_versions(),
    )


def _ask_written(job: _Job, merged: _Merged, staging: Path) -> Answers:
    """The answers of what lies on disk, computed in float32: all that differs is the rounding."""
    with progress("reading the written model again"):
        written = load_base(str(staging), dtype="float32", device=job.settings.device)
    return _ask("asking the written model", written.model, merged.probes, merged.stop_token_ids)


def _cost_of_merging(job: _Job, merged: _Merged, got: Answers) -> tuple[Comparison | None, str]:
    """The merged model against the adapter on the quantized base that it was trained on.

    An adapter partly learns to undo its base's quantization, which merging takes away from it.
    This is reported and decides nothing: the unquantized base is the right one to merge into.
    """
    manifest = job.adapter.manifest
    if manifest is None or manifest.base.quantization not in ("nf4", "int8"):
        return None, "the adapter is not recorded as trained on an NF4 or int8 base"
    if not job.settings.compare_quantized:
        return None, "not asked for"
    kind: Quantization = "nf4" if manifest.base.quantization == "nf4" else "int8"
    if find_spec("bitsandbytes") is None:
        return None, f"{kind} needs bitsandbytes: pip install 'qlora-serve[quant]'"
    double = manifest.recipe.get("double_quantization", True) is True
    try:
        with progress(f"loading the base in {kind}"):
            base = load_base(
                str(job.base.source.path), kind, "float32", job.settings.device, double
            )
        model = attach_adapter(base.model, job.adapter)
        with progress(f"asking the {kind} base", total=len(got.greedy)) as bar:
            quantized = follow(model, merged.probes, got.greedy, bar.update)
    except (QloraServeError, RuntimeError, ValueError) as error:
        # The merge itself is proven by now; a device without int8 kernels must not undo it.
        return None, f"could not be measured: {' '.join(str(error).split())[:200]}"
    return compare(quantized, got), ""


def _require_change(job: _Job, changes: dict[str, float], effect: Comparison) -> None:
    weight_change = max(changes.values(), default=0.0)
    if weight_change > _DEAD_WEIGHT_CHANGE or effect.relative_difference > _DEAD_LOGIT_CHANGE:
        return
    raise MergeError(
        f"adapter {job.adapter.path} changes nothing (largest change of a weight "
        f"{weight_change:.1g}): it was never trained, or it was saved before training; nothing "
        "was published"
    )


def _stop_token_ids(job: _Job, base: LoadedBase) -> list[int]:
    """What ends an answer: all that training relied on, and all that the base stops at."""
    manifest = job.adapter.manifest
    trained = manifest.stop_token_ids if manifest is not None else []
    return sorted(base.stop_token_ids.union(trained))


def _ask(title: str, model: Any, probes: Probes, stops: list[int]) -> Answers:
    with progress(title, total=len(probes.token_ids)) as bar:
        return ask(model, probes, stops, bar.update)
