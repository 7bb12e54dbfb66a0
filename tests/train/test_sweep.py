"""Sweeps on tiny models: every point, going on, failing."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_serve.adapters.files import read_adapter
from qlora_serve.errors import ConfigError
from qlora_serve.settings import load_settings
from qlora_serve.train.sweep import best, points, sweep
from qlora_serve.train.sweep_config import SweepSettings
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def _settings(base: Path, tmp_path: Path, **changes: Any) -> SweepSettings:
    data = write_chats(tmp_path / "d.jsonl", SOME_CHATS)
    recipe = {"base": str(base), "data": str(data), "device": "cpu", "max_steps": 4}
    given = {
        "output": tmp_path / "sweep", "recipe": recipe | changes.pop("recipe", {}),
        "grid": {"rank": [2, 4], "learning_rate": [1e-4, 1e-2]}, "heldout": data,
        "answers": False, "eval_rows": 8,
    }  # fmt: skip
    return SweepSettings(**(given | changes))


def test_each_point_is_an_adapter_and_the_best_is_found(base: Path, tmp_path: Path) -> None:
    settings = _settings(base, tmp_path)
    lines: list[str] = []
    result = sweep(settings, lines.append)
    assert list(result.points) == [
        "rank-2.learning_rate-0_0001", "rank-2.learning_rate-0_01",
        "rank-4.learning_rate-0_0001", "rank-4.learning_rate-0_01",
    ]  # fmt: skip
    for name, values in result.points.items():
        assert read_adapter(settings.output / name).config["r"] == values["rank"]
    assert result.evaluation is not None
    losses = {name: m["loss"].value for name, m in result.evaluation.systems.items()}
    assert len(losses) == 5
    winner = best(result)
    assert winner is not None
    assert losses[winner] == min(losses.values())
    assert winner.endswith("0_01")  # four steps at a rate of 1e-4 do little
    page = (settings.output / "sweep.html").read_text()
    assert page.count("<rect") == 5
    assert "http" not in page
    assert json.loads((settings.output / "sweep.json").read_text())["failed"] == {}

    # Started again, nothing is trained: the files stay as they are.
    files = sorted(settings.output.glob("rank*/adapter_model.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    (settings.output / files[-1].parent.name / "adapter_config.json").rename(tmp_path / "taken")
    for file in files[-1].parent.iterdir():
        file.unlink()
    lines.clear()
    sweep(settings, lines.append)
    assert sum("finished before" in line for line in lines) == 3
    assert sum(line.endswith(": training") for line in lines) == 1
    assert [file.stat().st_mtime_ns for file in files[:-1]] == before[:-1]

    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        sweep(_settings(base, tmp_path, recipe={"seed": 5}), lines.append)


def test_a_point_that_fails_does_not_stop_the_rest(base: Path, tmp_path: Path) -> None:
    grid = {"target_modules": ["nothing_like_it", "q_proj"], "rank": [2]}
    lines: list[str] = []
    result = sweep(_settings(base, tmp_path, grid=grid), lines.append)
    assert list(result.failed) == ["target_modules-nothing_like_it.rank-2"]
    assert "match nothing" in result.failed["target_modules-nothing_like_it.rank-2"]
    assert best(result) == "target_modules-q_proj.rank-2"
    assert "match nothing" in (tmp_path / "sweep" / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({}, "at least one setting"), ({"rank": []}, "rank has no values"),
        ({"ranks": [1]}, "'ranks' is no setting"), ({"output": ["a"]}, "'output' is no setting"),
        ({"rank": [8, 8]}, "rank has a value twice"),
        ({"rank": list(range(1, 102)), "seed": list(range(10))}, "1010 points"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused(
    base: Path, tmp_path: Path, grid: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _settings(base, tmp_path, grid=grid)


def test_wrong_values_are_found_before_the_first_point(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"point rank-0: rank: .*greater than"):
        sweep(_settings(base, tmp_path, grid={"rank": [4, 0]}), lambda _: None)
    assert not (tmp_path / "sweep").exists()


def test_the_example_is_a_sweep(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples" / "recipes" / "tagging-sweep.yaml"
    settings = load_settings(SweepSettings, file, {"output": tmp_path})
    assert len(points(settings)) == 8
