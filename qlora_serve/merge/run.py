"""The flow of a merge: base and adapter are asked, baked, written, read again and compared."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_serve.adapters.files import AdapterFiles, read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.manifest import package_versions
from qlora_serve.adapters.peft_config import base_changing_start
from qlora_serve.adapters.tokens import choose_tokenizer
from qlora_serve.adapters.vocabulary import enlarge, require_whole
from qlora_serve.adapters.weights import check_finite
from qlora_serve.base.identity import weight_files
from qlora_serve.base.load import LoadedBase, load_base
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.base.tokenizer import stop_token_ids
from qlora_serve.errors import MergeError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.merge.bake import attach_adapter, bake, count_layers
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.cost import cost_of_merging
from qlora_serve.merge.export import (
    cast_weights,
    count_weights,
    require_space,
    write_model,
    write_surroundings,
)
from qlora_serve.merge.gguf.export import require_exportable, write_gguf
from qlora_serve.merge.proof import (
    Answers,
    Comparison,
    Probes,
    ask,
    choose_probes,
    compare,
    find_fault,
)
from qlora_serve.merge.quantized import quantize_merged, require_quantizer
from qlora_serve.merge.report import MergeReport, write_report
from qlora_serve.merge.sources import MergeBase, choose_base, stored_dtype
from qlora_serve.merge.stream import count_tensors, merge_streamed, why_not_streamable
from qlora_serve.progress import progress
from qlora_serve.settings import parse_bytes

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
    vocabulary: int
    """The rows of the merged model's embeddings."""
    is_enlarged: bool
    """Whether these are more than the base's."""
    tokenizer: Any
    tokenizer_from: str
    is_streamed: bool


@dataclass(frozen=True)
class _Reference:
    """What the merged model has to answer."""

    stop_token_ids: list[int]
    probes: Probes
    expected: Answers
    """What base and adapter answer."""
    effect: Comparison
    """The base alone against base and adapter."""


@dataclass(frozen=True)
class _Written:
    """What was done to the weights."""

    changes: dict[str, float]
    is_untied: bool


def merge_adapter(settings: MergeSettings) -> MergeReport:
    """Merges an adapter into its unquantized base and publishes the result if it is proven.

    One model is in memory at a time. A streamed merge needs none for merging itself: base and
    adapter are asked first, their answers kept, and the written model is asked afterwards.

    Raises:
        AdapterError: the adapter is broken or does not fit the base.
        BaseModelError: the base cannot be loaded.
        MergeError: there is no right base, the adapter changes nothing, or the merged model does
            not answer as the adapter does.
        OutputError: the output holds something, or the disk is full.
    """
    require_quantizer(settings)
    job = _prepare(settings)
    report = _merge_and_prove(job)
    if settings.quantize != "none":
        gc.collect()
        probes = choose_probes(job.adapter, job.tokenizer, job.vocabulary)
        found = {
            "quantized": str(settings.quantized_output),
            "quantized_against_merged": quantize_merged(settings, probes, report.stop_token_ids),
        }
        report = report.model_copy(update=found)
        write_report(settings.output, report)
    return report


def _merge_and_prove(job: _Job) -> MergeReport:
    settings = job.settings
    peft_model, reference = _ask_reference(job)
    if job.is_streamed:
        del peft_model
        gc.collect()
        with published_directory(settings.output) as staging:
            written = _stream(job, reference, staging)
            return _prove(job, reference, written, staging)
    layers = count_layers(peft_model)
    with progress("merging layers", total=layers) as bar:
        baked = bake(peft_model, bar.update)
    del peft_model
    _require_change(job, baked.changes, reference.effect)
    with published_directory(settings.output) as staging:
        written = _Written(baked.changes, baked.is_untied)
        _write(job, baked.model, reference, staging)
        del baked
        gc.collect()
        return _prove(job, reference, written, staging)


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
        fit = FitChecker(base.source)
        expected = fit.check(adapter)
        if expected.vocabulary is not None:
            require_whole(adapter, fit.embeddings, expected.saved_modules)
        tensors = adapter.load_tensors()
        check_finite(adapter, tensors)
        identity = content_identity(adapter, tensors)
        vocabulary = expected.vocabulary or fit.embeddings.rows
        tokenizer, origin = choose_tokenizer(adapter.path, base.source, vocabulary)
        if settings.gguf:
            require_exportable(base.source, vocabulary, tokenizer)
    return _Job(
        settings=settings,
        adapter=adapter,
        identity=identity,
        base=base,
        dtype=settings.dtype or stored_dtype(base.source),
        vocabulary=vocabulary,
        is_enlarged=expected.vocabulary is not None,
        tokenizer=tokenizer,
        tokenizer_from=origin,
        is_streamed=_is_streamed(settings, base),
    )


def _is_streamed(settings: MergeSettings, base: MergeBase) -> bool:
    if settings.streaming == "off":
        return False
    size = sum(file.stat().st_size for file in weight_files(base.source))
    if settings.streaming == "auto" and size <= parse_bytes(settings.streaming_above):
        return False
    reason = why_not_streamable(base.source)
    if reason is not None and settings.streaming == "on":
        raise MergeError(
            f"{base.source.name} cannot be merged tensor by tensor: {reason}; leave --streaming out"
        )
    return reason is None


def _ask_reference(job: _Job) -> tuple[Any, _Reference]:
    """Loads base and adapter and asks both; the model comes back ready to be baked."""
    dtype = job.settings.proof_dtype if job.is_streamed else "float32"
    with progress(f"loading {job.base.source.display_name} in {dtype}"):
        base = load_base(str(job.base.source.path), dtype=dtype, device=job.settings.device)
    if job.is_enlarged:
        enlarge(base.model, job.adapter, job.vocabulary)
    probes = choose_probes(job.adapter, job.tokenizer, job.vocabulary)
    stops = _stop_token_ids(job, base)
    base_answers = _ask("asking the base", base.model, probes, stops)
    peft_model = attach_adapter(base.model, job.adapter)
    expected = _ask("asking base and adapter", peft_model, probes, stops)
    effect = compare(expected, base_answers)
    return peft_model, _Reference(stops, probes, expected, effect)


def _write(job: _Job, model: Any, reference: _Reference, staging: Path) -> None:
    with progress(f"writing {job.dtype} weights"):
        require_space(staging, count_weights(model), job.dtype)
        cast_weights(model, job.dtype)
        shard_size = job.settings.max_shard_size
        write_model(staging, model, job.tokenizer, reference.stop_token_ids, shard_size)


def _stream(job: _Job, reference: _Reference, staging: Path) -> _Written:
    source = job.base.source
    vocabulary = job.vocabulary if job.is_enlarged else None
    require_space(staging, count_weights(build_skeleton(source, vocabulary)), job.dtype)
    with progress(f"streaming {job.dtype} weights", total=count_tensors(source)) as bar:
        streamed = merge_streamed(
            staging,
            source,
            job.adapter,
            job.dtype,
            job.settings.max_shard_size,
            vocabulary,
            bar.update,
        )
    _require_change(job, streamed.changes, reference.effect)
    write_surroundings(staging, source, streamed.model, job.tokenizer, reference.stop_token_ids)
    return _Written(streamed.changes, streamed.is_untied)


def _prove(job: _Job, reference: _Reference, written: _Written, staging: Path) -> MergeReport:
    settings, manifest = job.settings, job.adapter.manifest
    tolerance = settings.tolerance_for(job.dtype)
    got = _ask_written(job, reference, staging)
    result = compare(reference.expected, got)
    fault = find_fault(result, reference.effect, tolerance, job.dtype)
    if fault is not None and not settings.force:
        raise MergeError(
            f"{fault}; nothing was published. Use a wider --dtype, set --tolerance, or publish it "
            "all the same with --force"
        )
    gc.collect()
    cost, note = None, "not asked for"
    if settings.compare_quantized:
        cost, note = cost_of_merging(
            job.adapter,
            job.base.source,
            reference.probes,
            got,
            settings.device,
            job.vocabulary if job.is_enlarged else None,
        )
    report = MergeReport(
        adapter=str(job.adapter.path),
        adapter_identity=job.identity,
        base=job.base.source.name,
        base_fingerprint=job.base.fingerprint,
        base_match=job.base.match,
        base_match_reason=job.base.reason,
        trained_on=manifest.base.quantization if manifest is not None else "unknown",
        dtype=job.dtype,
        streamed=job.is_streamed,
        vocabulary=job.vocabulary,
        tokenizer_from=job.tokenizer_from,
        proof_dtype=settings.proof_dtype if job.is_streamed else "float32",
        tolerance=tolerance,
        fault=fault,
        changed_modules=written.changes,
        untied_embeddings=written.is_untied,
        stop_token_ids=reference.stop_token_ids,
        probes=len(reference.probes.token_ids),
        probes_origin=reference.probes.origin,
        merged_against_adapter=result,
        base_against_adapter=reference.effect,
        merged_against_quantized=cost,
        merged_against_quantized_note=note,
        versions=package_versions(),
    )
    write_report(staging, report)
    if settings.gguf:
        gc.collect()
        written_source = BaseSource(str(staging), staging)
        checks = write_gguf(
            staging, written_source, settings.gguf, settings.output.name, reference.probes
        )
        report = report.model_copy(update={"gguf": checks})
        write_report(staging, report)
    return report


def _ask_written(job: _Job, reference: _Reference, staging: Path) -> Answers:
    """The answers of what lies on disk, computed as the reference was: only rounding differs."""
    dtype = job.settings.proof_dtype if job.is_streamed else "float32"
    with progress("reading the written model again"):
        written = load_base(str(staging), dtype=dtype, device=job.settings.device)
    return _ask(
        "asking the written model", written.model, reference.probes, reference.stop_token_ids
    )


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
    # The adapter may bring a tokenizer and a chat template that ends its turns with another token.
    own = stop_token_ids(job.tokenizer)
    return sorted(base.stop_token_ids | own | set(trained))


def _ask(title: str, model: Any, probes: Probes, stops: list[int]) -> Answers:
    with progress(title, total=len(probes.token_ids)) as bar:
        return ask(model, probes, stops, bar.update)
