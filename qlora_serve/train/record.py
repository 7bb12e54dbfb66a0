"""What is written beside a trained adapter, for later commands: its manifest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_serve.adapters.manifest import Manifest, ManifestBase, package_versions
from qlora_serve.base.source import BaseSource
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.prepare import RunData, manifest_data

if TYPE_CHECKING:
    from qlora_serve.base.load import LoadedBase
    from qlora_serve.train.dataset import DataCounts
    from qlora_serve.train.log import TrainingLog


def base_name(source: BaseSource) -> str:
    """How later commands find the base again, from any directory."""
    is_directory = Path(source.name).expanduser().is_dir()
    return str(source.path) if is_directory else source.name


def make_manifest(
    settings: TrainSettings,
    data: RunData,
    counts: "DataCounts",
    base: "LoadedBase",
    unquantized: str | None,
    log: "TrainingLog",
    probes: list[list[int]],
    published_step: int | None,
    dtype: str,
) -> Manifest:
    """The manifest of an adapter, or of a checkpoint of it.

    Args:
        settings: of the run.
        data: what was trained on.
        counts: what became of it.
        base: the loaded base.
        unquantized: the base that a merge will load.
        log: of the steps so far.
        probes: token ids of prompts, with which a merge is proven.
        published_step: the step whose weights these are, where it is not the last.
        dtype: what the steps computed in.
    """
    best = log.best
    extra: dict[str, Any] = {} if best is None else {"eval_loss": log.evaluations[-1].loss}
    if best is not None and published_step not in (None, len(log.steps)):
        extra = {"eval_loss": best.loss, "published_step": published_step}
    return Manifest(
        base=ManifestBase(
            name=base_name(base.source),
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            dtype=dtype,
            unquantized=unquantized,
        ),
        recipe=settings.model_dump(mode="json"),
        data=manifest_data(data, counts),
        metrics=_metrics(log) | extra,
        probes=probes,
        probes_from="training rows" if data.evaluation is None else "held-out rows",
        stop_token_ids=sorted(base.stop_token_ids),
        versions=package_versions(),
    )


def _metrics(log: "TrainingLog") -> dict[str, Any]:
    losses = log.losses
    # Steps before a run was resumed count too: the log has them all.
    seconds = sum(step.seconds for step in log.steps)
    tokens = sum(step.tokens for step in log.steps)
    return {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": sum(losses) / len(losses),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
