"""A training run from settings to a published adapter directory."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_serve.adapters.manifest import Manifest, ManifestBase, package_versions, write_manifest
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, ConfigError, OutputError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.progress import progress
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.interrupt import terminate_as_interrupt
from qlora_serve.train.prepare import (
    PreparedData,
    RunData,
    describe_counts,
    longest_rows,
    manifest_data,
    prepare_data,
    read_run_data,
)

# torch and transformers take seconds to import. What needs them is imported when everything that
# can be checked without them has been, so that a misspelt file name is answered at once.
if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.dataset import DataCounts
    from qlora_serve.train.trainer import TrainOutcome

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


def train(settings: TrainSettings, report: Report) -> TrainResult:
    """Trains an adapter, checks it, and publishes it at `settings.output`.

    Args:
        settings: the run.
        report: takes lines for people.

    Raises:
        BaseModelError: the base does not exist or cannot be trained on.
        ConfigError: a setting does not fit the base.
        DataError: the data cannot be used.
        OutputError: the output is taken, or cannot be written.
        TrainError: the loss is not finite, or the trained adapter failed its checks.
        KeyboardInterrupt: someone asked to stop; the output does not appear, and if training had
            begun a checkpoint was saved.
    """
    with terminate_as_interrupt():
        _check_outputs(settings)
        data = read_run_data(settings, settings.seed)
        source = locate_base(settings.base)
        unquantized = _unquantized(settings, source)
        max_length = longest_rows(settings.max_length, source)
        return _train(settings, data, unquantized, max_length, report)


def _train(
    settings: TrainSettings,
    data: RunData,
    unquantized: str | None,
    max_length: int,
    report: Report,
) -> TrainResult:
    from transformers import set_seed

    from qlora_serve.base.load import load_base
    from qlora_serve.train.dataset import probe_ids
    from qlora_serve.train.model import add_lora
    from qlora_serve.train.trainer import save_adapter, train_model
    from qlora_serve.train.verify import verify_saved

    with progress(f"loading {settings.base}"):
        base = load_base(
            settings.base,
            settings.quantization,
            settings.dtype,
            settings.device,
            settings.double_quantization,
        )
    _check_dtype(base)
    prepared = prepare_data(settings, data, base, max_length)
    set_seed(settings.seed)
    model = add_lora(base, settings, _base_name(base.source))
    _report_data(data, prepared, report)
    _report_start(base, model, unquantized, report)

    outcome = _or_say_where(lambda: train_model(model, prepared.dataset, settings), report)

    chats = _spread(data.train.rows)
    probes = [probe_ids(base.tokenizer, chat)[:_PROBE_TOKENS] for chat in chats]
    counts = prepared.counts
    passes = _passes(settings, len(prepared.dataset), len(outcome.losses))
    # Rows that are tokenized one by one are counted when their turn has come.
    passes = passes if prepared.is_counted else max(passes, 1)
    manifest = _manifest(settings, data, counts, passes, base, unquantized, outcome, probes)
    with published_directory(settings.output) as staging:
        save_adapter(model, staging)
        write_manifest(staging, manifest)
        (staging / "README.md").write_text(_card(settings, manifest), encoding="utf-8")
        verify_saved(model, staging, base.source, probes, base.dtype)
    _report_end(settings, manifest, report)
    return TrainResult(settings.output, manifest)


def _check_outputs(settings: TrainSettings) -> None:
    require_free_output(settings.output)
    try:
        require_free_output(settings.checkpoints)
    except OutputError:
        raise OutputError(
            f"{settings.checkpoints} holds the checkpoints of an earlier run; remove it, or name "
            "another output directory"
        ) from None


def _unquantized(settings: TrainSettings, source: BaseSource) -> str | None:
    """The base that a merge of this adapter will load."""
    if source.quantization == "none":
        if settings.unquantized_base is not None:
            raise ConfigError(
                f"unquantized_base: {settings.base} is itself unquantized; leave the setting out"
            )
        return _base_name(source)
    if settings.unquantized_base is None:
        return source.unquantized
    named = locate_base(settings.unquantized_base)
    if named.quantization != "none":
        raise BaseModelError(
            f"--unquantized-base {settings.unquantized_base} is quantized ({named.quantization}); "
            "name the base that it was made from"
        )
    return _base_name(named)


def _base_name(source: BaseSource) -> str:
    """How later commands find the base again, from any directory."""
    is_directory = Path(source.name).expanduser().is_dir()
    return str(source.path) if is_directory else source.name


def _check_dtype(base: "LoadedBase") -> None:
    if base.dtype == "float16" and base.device.type == "cpu":
        raise ConfigError(
            "dtype: float16 gradients vanish on a CPU; use float32 or bfloat16, or a GPU"
        )


def _or_say_where(run: "Callable[[], TrainOutcome]", report: Report) -> "TrainOutcome":
    from qlora_serve.train.trainer import TrainingStopped

    try:
        return run()
    except TrainingStopped as stopped:
        report(
            f"stopped after step {stopped.step}; its adapter is in {stopped.checkpoint}, and the "
            "output was not written"
        )
        raise


def _spread(rows: list[Any]) -> list[Any]:
    """Up to `_PROBES` rows, evenly spread over the file."""
    count = min(_PROBES, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _manifest(
    settings: TrainSettings,
    data: RunData,
    counts: "DataCounts",
    passes: float,
    base: "LoadedBase",
    unquantized: str | None,
    outcome: "TrainOutcome",
    probes: list[list[int]],
) -> Manifest:
    losses, seconds = outcome.losses, outcome.seconds
    return Manifest(
        base=ManifestBase(
            name=_base_name(base.source),
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            dtype=base.dtype,
            unquantized=unquantized,
        ),
        recipe=settings.model_dump(mode="json"),
        data=manifest_data(data, counts),
        metrics={
            "steps": len(losses),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "mean_loss": sum(losses) / len(losses),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(passes * counts.tokens / seconds, 1),
        },
        probes=probes,
        stop_token_ids=sorted(base.stop_token_ids),
        versions=package_versions(),
    )


def _passes(settings: TrainSettings, items: int, steps: int) -> float:
    """How often the run went over the data."""
    if settings.max_steps is None:
        return settings.epochs
    return steps * settings.micro_batch * settings.accumulation / items


def _card(settings: TrainSettings, manifest: Manifest) -> str:
    """A README for whoever finds the directory."""
    metrics = manifest.metrics
    return (
        f"---\nbase_model: {manifest.base.name}\nlibrary_name: peft\n"
        "pipeline_tag: text-generation\ntags: [lora, qlora-serve]\n---\n\n"
        f"# {settings.output.name}\n\n"
        f"A LoRA adapter for `{manifest.base.name}`, trained by qlora-serve on "
        f"{manifest.data['rows']} chats in {metrics['steps']} steps; the loss went from "
        f"{metrics['first_loss']:.3f} to {metrics['last_loss']:.3f}.\n"
        "`qlora_serve.json` holds the whole recipe. Any tool that reads PEFT directories can load "
        "it.\n"
    )


def _report_data(data: RunData, prepared: PreparedData, report: Report) -> None:
    for line in data.describe():
        report(line)
    if prepared.is_counted:
        report(describe_counts(prepared.counts))
    for line in prepared.warnings:
        report(f"warning: {line}")


def _report_start(base: "LoadedBase", model: Any, unquantized: str | None, report: Report) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    share = 100 * trainable / total
    report(f"adapter: {trainable:,} of {total:,} parameters are trained ({share:.2f} %)")
    digest = base.fingerprint.removeprefix("sha256:")[:12]
    report(f"base: {base.source.name} ({base.quantization}, {base.dtype}), fingerprint {digest}")
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
    serve = f"qlora-serve serve {shlex.quote(settings.base)}{flag} --adapter"
    report(f"next: {serve} {shlex.quote(name)}={output}")
    base = "" if manifest.base.unquantized else " --base UNQUANTIZED_BASE"
    merged = shlex.quote(f"{settings.output}-merged")
    report(f"  or: qlora-serve merge {output} --output {merged}{base}")
