"""What a run says to people, line by line."""

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlora_serve.adapters.manifest import Manifest
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.prepare import PreparedData, RunData, describe_counts
from qlora_serve.wording import counted

if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.trainer import TrainOutcome

Report = Callable[[str], None]


def propose_vocabulary(
    settings: TrainSettings, base: "LoadedBase", weights: list[Any] | None, report: Report
) -> None:
    """Names the template's tokens that the base has never learnt, and how to teach them."""
    from qlora_serve.train.model import untaught_tokens, vocabulary_flags

    untaught = untaught_tokens(base, settings, weights)
    if untaught:
        rows = " ".join(f"--trainable-tokens {shlex.quote(token)}" for token in untaught)
        report(
            f"note: this base has never learnt {', '.join(untaught)}, which its chat template "
            f"writes; {vocabulary_flags(base.model)} trains its vocabulary with the adapter, "
            f"{rows} only these rows of it"
        )


def report_data(data: RunData, prepared: PreparedData, report: Report) -> None:
    """Says what is trained on."""
    for line in data.describe():
        report(line)
    if prepared.is_counted:
        report(describe_counts(prepared.counts))
    for line in prepared.warnings:
        report(f"warning: {line}")


def report_start(
    settings: TrainSettings,
    base: "LoadedBase",
    dtype: str,
    model: Any,
    unquantized: str | None,
    report: Report,
) -> None:
    """Says what is trained, and on which base."""
    from qlora_serve.base.load import has_bfloat16
    from qlora_serve.train.model import count_parameters

    trainable, total = count_parameters(model)
    share = 100 * trainable / total
    what = "model" if trainable == total else "adapter"
    report(f"{what}: {trainable:,} of {total:,} parameters are trained ({share:.2f} %)")
    unused = unused_settings(settings)
    if unused:
        report(f"note: --method full has no adapter, and no use for {', '.join(unused)}")
    digest = base.fingerprint.removeprefix("sha256:")[:12]
    report(f"base: {base.source.name} ({base.quantization}, {dtype}), fingerprint {digest}")
    hint = dtype_hint(dtype, has_bfloat16(base.device))
    if hint is not None:
        report(hint)
    if unquantized is None:
        report(
            "note: the unquantized form of this base is not known; --unquantized-base names it for "
            "a later merge"
        )


def unused_settings(settings: TrainSettings) -> list[str]:
    """What was set for an adapter where there is none, as where a recipe serves both methods."""
    if settings.method != "full":
        return []
    names = ("rank", "alpha", "dropout", "target_modules")
    fields = type(settings).model_fields
    return [name for name in names if getattr(settings, name) != fields[name].default]


def report_end(settings: TrainSettings, manifest: Manifest, report: Report) -> None:
    """Says how it went, and what can be done with the result."""
    metrics = manifest.metrics
    loss = metrics.get("eval_loss")
    held_out = "" if loss is None else f"; on held-out rows {loss:.4f}"
    report(
        f"saved {settings.output}: {counted(metrics['steps'], 'step', 'steps')} in "
        f"{metrics['seconds']:.0f} s, loss {metrics['first_loss']:.4f} to "
        f"{metrics['last_loss']:.4f}{held_out}"
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


def or_say_where(run: "Callable[[], TrainOutcome]", report: Report) -> "TrainOutcome":
    """Runs the training loop; when someone stops it, says where its checkpoint is."""
    from qlora_serve.train.trainer import TrainingStopped

    try:
        return run()
    except TrainingStopped as stopped:
        report(
            f"stopped after step {stopped.step}; its adapter is in {stopped.checkpoint}, and the "
            "output was not written; go on with the same command and --resume"
        )
        raise


def dtype_hint(dtype: str, gpu_has_bfloat16: bool) -> str | None:
    """A word on float16 where the device could do better."""
    if dtype != "float16" or not gpu_has_bfloat16:
        return None
    return (
        "note: this GPU computes in bfloat16 too, in which gradients neither vanish nor overflow; "
        "--dtype bfloat16 is the safer choice"
    )
