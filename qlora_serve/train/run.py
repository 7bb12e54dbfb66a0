"""A training run from settings to a published adapter directory."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_serve.adapters.manifest import Manifest, write_manifest
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, ConfigError, OutputError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.progress import progress
from qlora_serve.train.checkpoints import (
    newest_whole,
    remove_leftovers,
    require_same_run,
    run_identity,
    step_of,
)
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.interrupt import terminate_as_interrupt
from qlora_serve.train.launch import is_worker, launch, needs_launch
from qlora_serve.train.parallel import is_main, local_rank, together
from qlora_serve.train.prepare import (
    PreparedData,
    RunData,
    describe_counts,
    longest_rows,
    prepare_data,
    read_run_data,
)
from qlora_serve.train.record import base_name, make_manifest
from qlora_serve.train.zero import check_stage, zero_stage

# torch and transformers take seconds to import. What needs them is imported when everything that
# can be checked without them has been, so that a misspelt file name is answered at once.
if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.trainer import Run, TrainOutcome

Report = Callable[[str], None]

_PROBES = 8
_PROBE_TOKENS = 256


@dataclass(frozen=True)
class TrainResult:
    """A finished training run."""

    path: Path
    """The adapter's directory."""
    manifest: Manifest
    """What was written beside it."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Losses, steps and speed."""
        return self.manifest.metrics


@dataclass(frozen=True)
class _Inputs:
    """What a run begins with, checked without torch."""

    data: RunData
    source: BaseSource
    unquantized: str | None
    max_length: int
    resume_from: Path | None


def train(settings: TrainSettings, report: Report) -> TrainResult:
    """Trains an adapter, checks it, and publishes it at `settings.output`.

    With several processes or DeepSpeed, this process checks what it can, starts the others, and
    waits for them.

    Args:
        settings: the run.
        report: takes lines for people.

    Raises:
        BaseModelError: the base does not exist or cannot be trained on.
        ConfigError: a setting does not fit the base.
        DataError: the data cannot be used.
        OutputError: the output is taken, or cannot be written.
        TrainError: the loss is not finite, nothing is learnt, the checkpoint to resume from is
            another run's, or the trained adapter failed its checks.
        KeyboardInterrupt: someone asked to stop; the output does not appear, and if training had
            begun a checkpoint was saved.
    """
    with terminate_as_interrupt():
        inputs = _check_inputs(settings)
        if needs_launch(settings) and not is_worker():
            return TrainResult(settings.output, launch(settings))
        return _train(settings, inputs, report if is_main() else _silent)


def _silent(_: str) -> None:
    pass


def _check_inputs(settings: TrainSettings) -> _Inputs:
    resume_from = _check_outputs(settings)
    data = read_run_data(settings, settings.seed)
    if data.evaluation is None and settings.eval_every:
        raise ConfigError("eval_every: no rows are held out; see --eval-split and --eval-data")
    source = locate_base(settings.base)
    check_stage(settings, source.quantization)
    unquantized = _unquantized(settings, source)
    max_length = longest_rows(settings.max_length, source)
    return _Inputs(data, source, unquantized, max_length, resume_from)


def _train(settings: TrainSettings, inputs: _Inputs, report: Report) -> TrainResult:
    from transformers import set_seed

    from qlora_serve.base.load import load_base, resolve
    from qlora_serve.train.arguments import training_arguments
    from qlora_serve.train.model import build_model
    from qlora_serve.train.trainer import train_model

    device = _device(settings)
    torch_device, dtype = resolve(device, settings.dtype)
    _check_hardware(settings, torch_device, dtype)
    vocabulary = _split_vocabulary(settings, inputs.source)
    # Joins the processes, and tells transformers that ZeRO-3 will split the weights: both have to
    # come before the model.
    arguments = training_arguments(settings, torch_device, dtype)
    with progress(f"loading {settings.base}", silent=not is_main()):
        base = load_base(
            settings.base,
            settings.quantization,
            # Weights that are all trained need float32, whatever the steps compute in.
            "float32" if settings.method == "full" else settings.dtype,
            device,
            settings.double_quantization,
        )
    prepared = prepare_data(settings, inputs.data, base, inputs.max_length)
    set_seed(settings.seed)
    _propose_vocabulary(settings, base, vocabulary, report)
    model = build_model(base, settings, base_name(base.source), _first_batches(prepared, settings))
    _report_data(inputs.data, prepared, report)
    _report_start(base, dtype, model, inputs.unquantized, report)

    unquantized = None if settings.init == "loftq" else inputs.unquantized
    probes = _probes(inputs.data, base)

    def manifest_of(log: Any, step: int | None = None) -> Manifest:
        return make_manifest(
            settings, inputs.data, prepared.counts, base, unquantized, log, probes, step, dtype
        )

    run = _run(settings, inputs, base, model, arguments, prepared, manifest_of)
    if run.resume_from is not None:
        report(f"resuming after step {step_of(run.resume_from)}, from {run.resume_from}")
    outcome = _or_say_where(lambda: train_model(run), report)
    manifest = manifest_of(outcome.log, outcome.step)
    with together():
        if is_main():
            _publish(settings, base, model, outcome, manifest, probes, dtype, report)
    _report_end(settings, manifest, report)
    return TrainResult(settings.output, manifest)


def _run(
    settings: TrainSettings,
    inputs: _Inputs,
    base: "LoadedBase",
    model: Any,
    arguments: Any,
    prepared: PreparedData,
    manifest_of: Callable[..., Manifest],
) -> "Run":
    from qlora_serve.train.dataset import RowDataset
    from qlora_serve.train.log import environment, read_log
    from qlora_serve.train.parallel import world_size
    from qlora_serve.train.samples import Sampler
    from qlora_serve.train.tracking import open_trackers
    from qlora_serve.train.trainer import Run

    identity = run_identity(
        settings,
        base.fingerprint,
        inputs.data.train.rows,
        inputs.data.evaluation.rows if inputs.data.evaluation else [],
    )
    if inputs.resume_from is not None:
        require_same_run(inputs.resume_from, identity)
        if is_main():
            remove_leftovers(settings.checkpoints)
    stops = sorted(base.stop_token_ids)
    return Run(
        model=model,
        settings=settings,
        arguments=arguments,
        dataset=prepared.dataset,
        held_out=RowDataset(prepared.evaluation) if prepared.evaluation else None,
        identity=identity,
        sampler=Sampler(base.tokenizer, stops, settings.sample_prompt, settings.sample_tokens),
        write_extra=lambda folder: _write_checkpoint_extra(
            settings, base, folder, manifest_of(read_log(folder))
        ),
        environment=environment(arguments.device, world_size()),
        resume_from=inputs.resume_from,
        callbacks=tuple(open_trackers(settings)) if is_main() else (),
    )


def _write_checkpoint_extra(
    settings: TrainSettings, base: "LoadedBase", folder: Path, manifest: Manifest
) -> None:
    """Makes a checkpoint an adapter (or model) that can be served and merged as it is."""
    write_manifest(folder, manifest)
    if settings.method == "full":
        base.tokenizer.save_pretrained(folder)


def _publish(
    settings: TrainSettings,
    base: "LoadedBase",
    model: Any,
    outcome: "TrainOutcome",
    manifest: Manifest,
    probes: list[list[int]],
    dtype: str,
    report: Report,
) -> None:
    from qlora_serve.train import save
    from qlora_serve.train.report.page import try_report
    from qlora_serve.train.verify import verify_model, verify_saved

    with published_directory(settings.output) as staging:
        if settings.method == "full":
            save.save_model(model, staging, outcome.tensors, dtype)
            base.tokenizer.save_pretrained(staging)
        else:
            save.save_adapter(model, staging, outcome.tensors)
        write_manifest(staging, manifest)
        outcome.log.write(staging)
        try_report(staging, settings.output.name, report)
        if settings.method == "full":
            verify_model(model, staging, outcome.tensors, probes, dtype)
        else:
            verify_saved(model, staging, base, outcome.tensors, probes)


def _check_outputs(settings: TrainSettings) -> Path | None:
    """The checkpoint to resume from, if the run is to be resumed."""
    require_free_output(settings.output)
    if not settings.resume:
        try:
            require_free_output(settings.checkpoints)
        except OutputError:
            raise OutputError(
                f"{settings.checkpoints} holds the checkpoints of an earlier run; go on with it by "
                "--resume, remove it, or name another output directory"
            ) from None
        return None
    newest = newest_whole(settings.checkpoints)
    if newest is None:
        raise OutputError(
            f"--resume: {settings.checkpoints} holds no whole checkpoint; leave --resume out to "
            "start again"
        )
    return newest


def _device(settings: TrainSettings) -> str:
    """The device of this process: one GPU each."""
    if settings.device != "auto" or not needs_launch(settings):
        return settings.device
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"processes: {settings.processes} on a machine with {torch.cuda.device_count()} GPUs; "
            "use one for each, or --device cpu"
        )
    return f"cuda:{local_rank()}"


def _check_hardware(settings: TrainSettings, device: Any, dtype: str) -> None:
    if device.type != "cpu":
        return
    if dtype == "float16":
        raise ConfigError(
            "dtype: float16 gradients vanish on a CPU; use float32 or bfloat16, or a GPU"
        )
    if settings.liger:
        raise ConfigError("liger: liger-kernel's operators are written for GPUs; leave it out")


def _split_vocabulary(settings: TrainSettings, source: BaseSource) -> list[Any] | None:
    """The weights of a base's vocabulary where ZeRO-3 will have split those of the model."""
    if zero_stage(settings) < 3 or not is_main():
        return None
    from qlora_serve.base.untrained import read_vocabulary_weights

    return read_vocabulary_weights(source)


def _propose_vocabulary(
    settings: TrainSettings, base: "LoadedBase", weights: list[Any] | None, report: Report
) -> None:
    from qlora_serve.train.model import untaught_tokens, vocabulary_flags

    untaught = untaught_tokens(base, settings, weights)
    if untaught:
        rows = " ".join(f"--trainable-tokens {shlex.quote(token)}" for token in untaught)
        report(
            f"note: this base has never learnt {', '.join(untaught)}, which its chat template "
            f"writes; {vocabulary_flags(base.model)} trains its vocabulary with the adapter, "
            f"{rows} only these rows of it"
        )


def _first_batches(
    prepared: PreparedData, settings: TrainSettings
) -> "Callable[[], list[dict[str, Any]]]":
    """Batches from all over the data, for an adapter that starts from it."""

    def batches() -> list[dict[str, Any]]:
        from qlora_serve.train.batches import pad_rows

        dataset = prepared.dataset
        size = min(settings.micro_batch, len(dataset))
        starts = range(0, len(dataset) - size + 1, size)
        chosen = list(starts)[:: max(1, len(starts) // _START_BATCHES)][:_START_BATCHES]
        return [pad_rows([dataset[start + row] for row in range(size)]) for start in chosen]

    return batches


_START_BATCHES = 32


def _probes(data: RunData, base: "LoadedBase") -> list[list[int]]:
    from qlora_serve.train.dataset import probe_ids

    chats = _spread(data.train.rows)
    return [probe_ids(base.tokenizer, chat)[:_PROBE_TOKENS] for chat in chats]


def _unquantized(settings: TrainSettings, source: BaseSource) -> str | None:
    """The base that a merge of this adapter will load."""
    if source.quantization == "none":
        if settings.unquantized_base is not None:
            raise ConfigError(
                f"unquantized_base: {settings.base} is itself unquantized; leave the setting out"
            )
        return base_name(source)
    if settings.unquantized_base is None:
        return source.unquantized
    named = locate_base(settings.unquantized_base)
    if named.quantization != "none":
        raise BaseModelError(
            f"--unquantized-base {settings.unquantized_base} is quantized ({named.quantization}); "
            "name the base that it was made from"
        )
    return base_name(named)


def _or_say_where(run: "Callable[[], TrainOutcome]", report: Report) -> "TrainOutcome":
    from qlora_serve.train.trainer import TrainingStopped

    try:
        return run()
    except TrainingStopped as stopped:
        report(
            f"stopped after step {stopped.step}; its adapter is in {stopped.checkpoint}, and the "
            "output was not written; go on with the same command and --resume"
        )
        raise


def _spread(rows: list[Any]) -> list[Any]:
    """Up to `_PROBES` rows, evenly spread over the file."""
    count = min(_PROBES, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _report_data(data: RunData, prepared: PreparedData, report: Report) -> None:
    for line in data.describe():
        report(line)
    if prepared.is_counted:
        report(describe_counts(prepared.counts))
    for line in prepared.warnings:
        report(f"warning: {line}")


def _report_start(
    base: "LoadedBase", dtype: str, model: Any, unquantized: str | None, report: Report
) -> None:
    from qlora_serve.train.model import count_parameters

    trainable, total = count_parameters(model)
    share = 100 * trainable / total
    what = "model" if trainable == total else "adapter"
    report(f"{what}: {trainable:,} of {total:,} parameters are trained ({share:.2f} %)")
    digest = base.fingerprint.removeprefix("sha256:")[:12]
    report(f"base: {base.source.name} ({base.quantization}, {dtype}), fingerprint {digest}")
    if unquantized is None:
        report(
            "note: the unquantized form of this base is not known; --unquantized-base names it for "
            "a later merge"
        )


def _report_end(settings: TrainSettings, manifest: Manifest, report: Report) -> None:
    metrics = manifest.metrics
    report(
        f"saved {settings.output}: {metrics['steps']} steps in {metrics['seconds']:.0f} s, loss "
        f"{metrics['first_loss']:.4f} to {metrics['last_loss']:.4f}"
    )
    output, name = shlex.quote(str(settings.output)), settings.output.name
    quantization = settings.quantization
    flag = "" if quantization == "none" else f" --quantization {quantization}"
    if settings.method == "full":
        report(f"next: qlora-serve serve {output}")
        return
    serve = f"qlora-serve serve {shlex.quote(settings.base)}{flag} --adapter"
    report(f"next: {serve} {shlex.quote(name)}={output}")
    base = "" if manifest.base.unquantized else " --base UNQUANTIZED_BASE"
    merged = shlex.quote(f"{settings.output}-merged")
    report(f"  or: qlora-serve merge {output} --output {merged}{base}")
