"""`report.html`: how a run went, in one file that loads nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import Manifest, read_manifest
from qlora_serve.errors import AdapterError, QloraServeError
from qlora_serve.train.card import model_card
from qlora_serve.train.report.charts import curve
from qlora_serve.train.report.recipe import RECIPE_FILE, recipe_text
from qlora_serve.wording import counted

REPORT_FILE = "report.html"
LOG_FILE = "training_log.json"
EVALUATION_FILE = "evaluation.json"

_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5", "soft")
Memory = dict[str, Any]


def try_report(folder: Path, name: str, report: Callable[[str], None]) -> None:
    """Writes the report of a finished run; a fault in it must not cost the adapter.

    Raises:
        OSError: the disk is full or cannot be written, which the adapter would meet as well.
    """
    try:
        write_report(folder, name)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        report(f"warning: report.html was not written ({type(error).__name__}: {reason})")


def write_report(folder: Path, name: str | None = None) -> None:
    """Writes README.md, report.html and recipe.yaml from what lies in an adapter's directory.

    Reads its manifest, and where they are there the log of its steps and an evaluation.

    Args:
        folder: the adapter's directory.
        name: of the adapter; the directory's own when left out.

    Raises:
        AdapterError: there is no manifest, so nothing is known about the run.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise AdapterError(f"{folder} was not trained by this tool, so there is no report to write")
    name = name or folder.name
    planned = planned_memory(manifest)
    parameters = planned["parameters"] if planned else None
    (folder / "README.md").write_text(model_card(name, manifest, parameters), encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe_text(manifest), encoding="utf-8")
    page = render(
        name, manifest, _read(folder / LOG_FILE), _read(folder / EVALUATION_FILE), planned
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def render(
    name: str,
    manifest: Manifest,
    log: dict[str, Any],
    evaluation: dict[str, Any],
    planned: Memory | None,
) -> str:
    """The page.

    Args:
        name: of the adapter.
        manifest: of its run.
        log: training_log.json; empty when there is none.
        evaluation: evaluation.json, as `eval` writes it; empty when there is none.
        planned: see `planned_memory`.
    """
    from importlib.resources import files

    from jinja2 import Environment

    template = files(__package__).joinpath("template.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    measured = int(log.get("peak_memory_bytes", 0))
    return environment.from_string(template).render(
        name=name,
        kind=_kind(manifest),
        base=manifest.base,
        tiles=_tiles(manifest, planned, measured),
        charts=_charts(log),
        evaluations=log.get("evaluations", []),
        evaluation=_evaluation(evaluation),
        samples=_samples(log.get("samples", [])),
        memory=_memory(planned, measured),
        memory_note=_memory_note(planned),
        data=_rows(manifest.data),
        environment=_environment(manifest, log),
        recipe=recipe_text(manifest),
    )


def planned_memory(manifest: Manifest) -> Memory | None:
    """What `plan` says of this run; None where it cannot say anything."""
    from qlora_serve.train.plan.config import PlanSettings
    from qlora_serve.train.plan.estimate import Planner

    data = manifest.data
    tokens, rows = data.get("tokens", 0), data.get("rows", 0)
    share = data.get("trained_tokens", 0) / max(1, tokens - rows)
    known = {
        key: value for key, value in manifest.recipe.items() if key in PlanSettings.model_fields
    }
    try:
        settings = PlanSettings(
            **known
            | {
                "base": manifest.base.name,
                "trained_share": min(1.0, max(share, 0.001)),
                "dtype": manifest.base.dtype,
                "device": _device(manifest),
            }
        )
        planner = Planner(settings)
        memory = planner.training(planner.given)
    except (QloraServeError, ValueError):
        return None
    return {
        "parts": memory.model_dump(),
        "total": memory.total,
        "length": planner.given.length,
        "micro_batch": planner.given.micro_batch,
        "parameters": {
            "trainable": planner.parameters.trainable,
            "total": planner.parameters.total,
        },
    }


def _device(manifest: Manifest) -> str:
    import torch

    asked = str(manifest.recipe.get("device", "auto"))
    return "cpu" if asked == "cpu" or not torch.cuda.is_available() else "cuda"


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none: a report does without."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _kind(manifest: Manifest) -> str:
    recipe = manifest.recipe
    if recipe.get("method") == "full":
        return "Full fine-tuning"
    name = "DoRA" if recipe.get("use_dora") else "rsLoRA" if recipe.get("use_rslora") else "LoRA"
    quantized = manifest.base.quantization != "none"
    return f"{'Q' if quantized and name == 'LoRA' else ''}{name} adapter"


def _tiles(manifest: Manifest, planned: Memory | None, measured: int) -> list[tuple[str, str]]:
    metrics = manifest.metrics
    loss = metrics.get("eval_loss")
    held_out = [] if loss is None else [("loss on held-out rows", f"{loss:.3f}")]
    tiles = [
        ("loss, first to last step", f"{metrics['first_loss']:.3f} → {metrics['last_loss']:.3f}"),
        *held_out,
        ("steps", f"{metrics['steps']:,}"),
        ("training time", _duration(float(metrics["seconds"]))),
        ("tokens a second", f"{metrics['tokens_per_second']:,.0f}"),
    ]
    if manifest.recipe.get("method") != "full":
        rank, alpha = manifest.recipe.get("rank", 0), manifest.recipe.get("alpha", 0)
        tiles.append(("rank, alpha", f"{rank}, {alpha:g}"))
    if planned is not None:
        tiles.append(("trained parameters", f"{planned['parameters']['trainable']:,}"))
    if measured:
        tiles.append(("peak memory", _size(measured)))
    return tiles


def _charts(log: dict[str, Any]) -> list[tuple[str, str]]:
    steps = log.get("steps", [])
    held_out = [(item["step"], item["loss"]) for item in log.get("evaluations", [])]
    charts = []
    for key, title, smooth in (
        ("loss", "Loss", True), ("learning_rate", "Learning rate", False),
        ("grad_norm", "Gradient norm", True),
    ):  # fmt: skip
        points = [(item["step"], item[key]) for item in steps if item.get(key) is not None]
        marks = held_out if key == "loss" else []
        svg = curve(points, title, smooth, marks)
        if svg:
            charts.append((f"{title}, dots: held-out rows" if marks else title, svg))
    return charts


def _evaluation(found: dict[str, Any]) -> dict[str, Any] | None:
    if not found:
        return None
    from qlora_serve.train.evaluate.run import Evaluation
    from qlora_serve.train.evaluate.show import HEADINGS, SURE, figure, is_better

    evaluation = Evaluation.model_validate(found)
    base = evaluation.systems["base"]
    systems = []
    for name, measures in evaluation.systems.items():
        cells = []
        for metric, measure in measures.items():
            mood = ""
            if measure.p_value is not None and measure.p_value < SURE:
                better = is_better(metric, measure.value, base[metric].value)
                mood = "good" if better else "bad"
            interval = f"{figure(metric, measure.low)} – {figure(metric, measure.high)}"
            cells.append(
                {"value": figure(metric, measure.value), "interval": interval, "mood": mood}
            )
        systems.append({"name": name, "cells": cells})
    return {
        "metrics": [HEADINGS[metric] for metric in base],
        "systems": systems,
        "note": (
            f"{evaluation.rows} held-out rows of {evaluation.data}; {evaluation.confidence:.0%} "
            "intervals by bootstrap. Coloured: differs from the base with p < 0.05 by paired "
            "randomization."
        ),
    }


def _samples(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first and the last answer to each prompt."""
    prompts = dict.fromkeys(item["prompt"] for item in found)
    samples = []
    for prompt in prompts:
        answers = sorted(
            (item for item in found if item["prompt"] == prompt), key=lambda item: item["step"]
        )
        if len(answers) > 1:
            first, last = answers[0], answers[-1]
            samples.append(
                {
                    "prompt": prompt,
                    "before": first["answer"],
                    "after": last["answer"],
                    "step": last["step"],
                }
            )
    return samples


def _memory(planned: Memory | None, measured: int) -> list[dict[str, Any]]:
    widest = max(planned["total"] if planned else 0, measured, 1)
    bars = []
    if planned is not None:
        parts = [
            {
                "name": name, "size": _size(count), "colour": colour,
                "width": round(100 * count / widest, 2),
            }
            for colour, (name, count) in zip(_COLOURS, planned["parts"].items(), strict=False)
            if count
        ]  # fmt: skip
        bars.append({"title": "planned", "total": _size(planned["total"]), "parts": parts})
    if measured:
        width = round(100 * measured / widest, 2)
        part = {"name": "measured", "size": _size(measured), "colour": "c5", "width": width}
        bars.append({"title": "measured", "total": _size(measured), "parts": [part]})
    return bars


def _memory_note(planned: Memory | None) -> str:
    if planned is None:
        return "This run could not be planned."
    return (
        f"Planned for full micro-batches of {planned['micro_batch']} × {planned['length']} tokens. "
        "Measured is the process: on a CPU also Python and its libraries, about half a GiB."
    )


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if key == "sources":
            rows += [(f"source {n}", _source(source)) for n, source in enumerate(value, 1)]
            continue
        if key == "evaluation" and value:
            rows += [(f"held-out {name}", text) for name, text in _rows(value)]
            continue
        if isinstance(value, dict | list):
            value = json.dumps(value, ensure_ascii=False)
        text = f"{value:,}" if isinstance(value, int) else str(value)
        rows.append((key.replace("_", " "), text))
    return rows


def _source(source: dict[str, Any]) -> str:
    weight = source.get("weight", 1)
    weighed = "" if weight == 1 else f", weight {weight:g}"
    rows = counted(source.get("rows", 0), "row", "rows")
    return f"{source['name']}: {source.get('format')}, {rows}{weighed}"


def _environment(manifest: Manifest, log: dict[str, Any]) -> list[tuple[str, str]]:
    machine = {k: v for k, v in log.get("environment", {}).items() if k != "versions"}
    return [*_rows(machine), *manifest.versions.items()]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _size(count: float) -> str:
    gib = count / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{count / 2**20:.1f} MiB"
