"""A training run from settings to a published adapter directory."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_serve.adapters.manifest import Manifest, write_manifest
from qlora_serve.base.memory import give_back
from qlora_serve.base.source import BaseSource
from qlora_serve.files import published_directory
from qlora_serve.progress import progress
from qlora_serve.train import announce
from qlora_serve.train.announce import Report
from qlora_serve.train.checkpoints import (
    remove_leftovers,
    require_same_run,
    run_identity,
    step_of,
)
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.inputs import (
    RunInputs,
    check_hardware,
    check_inputs,
    own_device,
    sample_rows,
)
from qlora_serve.train.interrupt import terminate_as_interrupt
from qlora_serve.train.launch import is_worker, launch, needs_launch
from qlora_serve.train.parallel import is_main, together
from qlora_serve.train.prepare import PreparedData, RunData, prepare_data
from qlora_serve.train.record import base_name, make_manifest
from qlora_serve.train.zero import zero_stage

# torch and transformers take seconds to import. What needs them is imported when everything that
# can be checked without them has been, so that a misspelt file name is answered at once.
if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.trainer import Run, TrainOutcome

_PROBES = 8
_PROBE_TOKENS = 256
_KERNELS = "32"


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
    _let_waiting_threads_sleep()
    _keep_few_kernels()
    with terminate_as_interrupt():
        inputs = check_inputs(settings)
        if needs_launch(settings) and not is_worker():
            return TrainResult(settings.output, launch(settings))
        return _train(settings, inputs, report if is_main() else _silent)


def _let_waiting_threads_sleep() -> None:
    """Keeps threads from spinning while they wait for the others, unless the user has chosen.

    torch's threads meet thousands of times in a step. Where anything else takes one of the cores,
    those that spin keep the late one from running: with one other busy process on two cores, a run
    was half as fast as with threads that sleep. OpenMP reads this when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_few_kernels() -> None:
    """Keeps oneDNN from collecting compiled products, unless the user has chosen.

    A step compiles some fifteen of them for its number of tokens, half a megabyte each, and the
    next step has another number. oneDNN and torch's layer above it keep the last 1024 each; what a
    layer needs is used again in the next layer. Both read this when they are first used.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS)


def _silent(_: str) -> None:
    pass


def _train(settings: TrainSettings, inputs: RunInputs, report: Report) -> TrainResult:
    from transformers import set_seed

    from qlora_serve.base.load import load_base, resolve
    from qlora_serve.train.arguments import training_arguments
    from qlora_serve.train.model import build_model
    from qlora_serve.train.trainer import train_model
    from qlora_serve.train.vocabulary import add_tokens

    device = own_device(settings)
    torch_device, dtype = resolve(device, settings.dtype)
    if torch_device.type == "cpu":
        # transformers imports DeepSpeed where it is installed, which warns when it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_hardware(settings, torch_device, dtype)
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
            trainable=True,
        )
    add_tokens(base, settings.add_tokens)
    prepared = prepare_data(settings, inputs.data, base, inputs.max_length)
    set_seed(settings.seed)
    announce.propose_vocabulary(settings, base, vocabulary, report)
    model = build_model(base, settings, base_name(base.source), _first_batches(prepared, settings))
    announce.report_data(inputs.data, prepared, report)
    announce.report_start(settings, base, dtype, model, inputs.unquantized, report)

    unquantized = None if settings.init == "loftq" else inputs.unquantized
    probes = _probes(inputs.data, base)

    def manifest_of(log: Any, step: int | None = None) -> Manifest:
        return make_manifest(
            settings, inputs.data, prepared.counts, base, unquantized, log, probes, step, dtype
        )

    run = _run(settings, inputs, base, model, arguments, prepared, manifest_of)
    if run.resume_from is not None:
        report(f"resuming after step {step_of(run.resume_from)}, from {run.resume_from}")
    outcome = announce.or_say_where(lambda: train_model(run), report)
    manifest = manifest_of(outcome.log, outcome.step)
    with together():
        if is_main():
            _publish(settings, base, model, outcome, manifest, probes, dtype, report)
    announce.report_end(settings, manifest, report)
    return TrainResult(settings.output, manifest)


def _run(
    settings: TrainSettings,
    inputs: RunInputs,
    base: "LoadedBase",
    model: Any,
    arguments: Any,
    prepared: PreparedData,
    manifest_of: Callable[..., Manifest],
) -> "Run":
    from qlora_serve.train.dataset import RowDataset
    from qlora_serve.train.log import environment, read_log
    from qlora_serve.train.parallel import world_size
    from qlora_serve.train.samples import Sampler, ask, question_of
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
    prompts = [ask(prompt) for prompt in settings.sample_prompt]
    prompts += [question_of(row) for row in sample_rows(settings, inputs.data)]
    return Run(
        model=model,
        settings=settings,
        arguments=arguments,
        dataset=prepared.dataset,
        held_out=RowDataset(prepared.evaluation) if prepared.evaluation else None,
        identity=identity,
        sampler=Sampler(base.tokenizer, stops, prompts, settings.sample_tokens),
        write_extra=lambda folder: _write_extra(
            settings, base, folder, manifest_of(read_log(folder))
        ),
        environment=environment(arguments.device, world_size()),
        resume_from=inputs.resume_from,
        callbacks=tuple(open_trackers(settings)) if is_main() else (),
    )


def _write_extra(
    settings: TrainSettings, base: "LoadedBase", folder: Path, manifest: Manifest
) -> None:
    """What makes an adapter (or model), or a checkpoint of it, usable as it is."""
    write_manifest(folder, manifest)
    if settings.method == "full" or settings.add_tokens:
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
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from qlora_serve.train import save
    from qlora_serve.train.report.page import try_report
    from qlora_serve.train.verify import verify_model, verify_saved

    with published_directory(settings.output) as staging:
        if settings.method == "full":
            save.save_model(model, staging, outcome.tensors, dtype)
        else:
            save.save_adapter(model, staging, outcome.tensors)
        if str(model.device) == "cpu":
            give_back()  # the checks need some, and training needs none any more
        # Else transformers would split the models that the report and the checks are made with, and
        # wait for processes that have nothing more to do.
        unset_hf_deepspeed_config()
        _write_extra(settings, base, staging, manifest)
        outcome.log.write(staging)
        try_report(staging, settings.output.name, report)
        if settings.method == "full":
            verify_model(model, staging, outcome.tensors, probes, dtype)
        else:
            verify_saved(model, staging, base, outcome.tensors, probes)


def _split_vocabulary(settings: TrainSettings, source: BaseSource) -> list[Any] | None:
    """The weights of a base's vocabulary where ZeRO-3 will have split those of the model."""
    if zero_stage(settings) < 3 or not is_main():
        return None
    from qlora_serve.base.untrained import read_vocabulary_weights

    return read_vocabulary_weights(source)


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

    chats = _spread(data.untrained_first().rows)
    return [probe_ids(base.tokenizer, chat)[:_PROBE_TOKENS] for chat in chats]


def _spread(rows: list[Any]) -> list[Any]:
    """Up to `_PROBES` rows, evenly spread over the file."""
    count = min(_PROBES, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
