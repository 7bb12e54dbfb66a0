"""A sweep: one adapter for each point of a grid, compared on held-out rows."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE
from qlora_serve.adapters.manifest import read_manifest
from qlora_serve.errors import ConfigError, QloraServeError
from qlora_serve.files import disk_errors
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.evaluate.config import EvalSettings
from qlora_serve.train.evaluate.run import BASE, Evaluation, evaluate
from qlora_serve.train.run import train
from qlora_serve.train.sweep_config import SweepSettings

RESULT_FILE = "sweep.json"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""

    name: str
    """Also its directory's, such as rank-8.learning_rate-0.0001."""
    values: dict[str, Any]
    settings: TrainSettings


@dataclass(frozen=True)
class SweepResult:
    """What became of every point."""

    points: dict[str, dict[str, Any]]
    """Name → its grid values."""
    failed: dict[str, str]
    """Name → why, in one line."""
    evaluation: Evaluation | None
    """Of the base and all adapters there are; None where no point was trained."""


def points(settings: SweepSettings) -> list[Point]:
    """Every point, checked before the first is trained.

    Raises:
        ConfigError: a point's settings do not go together; names the point.
    """
    found = []
    for combination in itertools.product(*settings.grid.values()):
        values = dict(zip(settings.grid, combination, strict=True))
        name = ".".join(f"{key}-{_plain(value)}" for key, value in values.items())
        given = settings.recipe | values | {"output": settings.output / name}
        try:
            found.append(Point(name, values, TrainSettings(**given)))
        except ValueError as error:
            errors: list[Any] = getattr(error, "errors", list)()
            reasons = "; ".join(
                ".".join(map(str, item["loc"])) + ": " + item["msg"] for item in errors
            )
            raise ConfigError(f"point {name}: {reasons or error}") from None
    names = [point.name for point in found]
    if len(set(names)) < len(names):
        raise ConfigError("two points of the grid would share a directory; give plainer values")
    return found


def sweep(settings: SweepSettings, report: Report) -> SweepResult:
    """Trains what is not trained yet, and compares all.

    A point that is finished is kept and skipped, so that a sweep that was stopped goes on when it
    is started again. A point that fails is reported, and the others go on.

    Raises:
        ConfigError: the grid or a point's settings are wrong, or a finished point was trained with
            other settings than it has now.
        KeyboardInterrupt: someone asked to stop; finished points stay.
    """
    todo = points(settings)
    for point in todo:
        _require_same(point)
    failed: dict[str, str] = {}
    for number, point in enumerate(todo, 1):
        title = f"point {number} of {len(todo)}, {point.name}"
        if (point.settings.output / CONFIG_FILE).is_file():
            report(f"{title}: finished before")
            continue
        report(f"{title}: training")
        # Of a point that was stopped; a sweep starts it afresh, the others stay.
        shutil.rmtree(point.settings.checkpoints, ignore_errors=True)
        try:
            train(point.settings, lambda _: None)
        except QloraServeError as error:
            failed[point.name] = str(error)
            report(f"{title}: failed: {error}")
    evaluation = _evaluate(settings, todo, failed, report)
    result = SweepResult({point.name: point.values for point in todo}, failed, evaluation)
    _write(settings, result)
    return result


def _require_same(point: Point) -> None:
    """A finished point must be the one that the file describes now."""
    folder = point.settings.output
    if not (folder / CONFIG_FILE).is_file():
        return
    manifest = read_manifest(folder)
    now = json.loads(point.settings.model_dump_json())
    before = {} if manifest is None else manifest.recipe
    changed = sorted(key for key in now if key != "output" and before.get(key) != now[key])
    if changed:
        raise ConfigError(
            f"{folder} was trained with other settings ({', '.join(changed)}); name another output "
            "or remove it"
        )


def _evaluate(
    settings: SweepSettings, todo: list[Point], failed: dict[str, str], report: Report
) -> Evaluation | None:
    """Base and adapters on the held-out rows; points on several bases cannot be compared."""
    trained = {p.name: p.settings for p in todo if p.name not in failed}
    if not trained:
        return None
    first = next(iter(trained.values()))
    kinds = {(p.base, p.quantization, p.dtype) for p in trained.values()}
    if len(kinds) > 1:
        report("note: the points have several bases, so that there is no common table")
        return None
    return evaluate(
        EvalSettings(
            base=first.base,
            adapter={name: point.output for name, point in trained.items()},
            data=settings.heldout,
            rows=settings.eval_rows,
            quantization=first.quantization,
            dtype=first.dtype,
            device=first.device,
            max_length=first.max_length or 1024,
            max_tokens=settings.max_tokens,
            answers=settings.answers,
            json_keys=settings.json_keys,
            seed=first.seed,
            output=settings.output / "rows.jsonl",
            update_reports=True,
        ),
        report,
    )


def _write(settings: SweepSettings, result: SweepResult) -> None:
    from qlora_serve.train.report.sweep import sweep_page

    content = {
        "points": result.points,
        "failed": result.failed,
        "evaluation": result.evaluation.model_dump() if result.evaluation else None,
    }
    with disk_errors(settings.output):
        settings.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (settings.output / RESULT_FILE).write_text(text, encoding="utf-8")
        (settings.output / "sweep.html").write_text(sweep_page(result), encoding="utf-8")


def best(result: SweepResult) -> str | None:
    """The adapter with the lowest held-out loss."""
    if result.evaluation is None:
        return None
    systems = result.evaluation.systems
    names = [name for name in systems if name != BASE]
    return min(names, key=lambda name: systems[name]["loss"].value)


def _plain(value: Any) -> str:
    """A value as a part of a directory's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in text)
    return kept.strip("_") or "none"
