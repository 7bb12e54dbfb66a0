"""Trackers: TensorBoard for real, and failures at every moment."""

from pathlib import Path
from typing import Any

import pytest

from qlora_serve.train import tracking
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.run import train
from qlora_serve.train.tracking import GuardedTracker, open_trackers
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, write_chats


def _settings(tmp_path: Path, **settings: Any) -> TrainSettings:
    base = write_tiny_model(tmp_path / "base")
    data = write_chats(tmp_path / "d.jsonl", SOME_CHATS)
    chosen = {"device": "cpu", "max_steps": 3, "rank": 2} | settings
    return TrainSettings(base=str(base), data=data, output=tmp_path / "out", **chosen)


def test_tensorboard_holds_the_losses_of_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(_settings(tmp_path, track=["tensorboard"]), lambda _: None)
    events = EventAccumulator(str(tmp_path / "out.tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert losses[0].value == pytest.approx(result.metrics["first_loss"], rel=1e-4)
    assert losses[-1].value == pytest.approx(result.metrics["last_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow", "trackio"])
def test_a_tracker_that_is_installed_follows_a_run_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.util import find_spec

    if find_spec(name) is None:  # not imported here: some read their environment at import
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)  # where some of them write
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    written = {"wandb": "wandb", "swanlab": "swanlog", "mlflow": "mlflow.db", "trackio": "trackio"}
    train(_settings(tmp_path, track=[name], eval_split=2, eval_every=2), lambda _: None)
    assert f"{name} does not track" not in capsys.readouterr().err
    assert (tmp_path / written[name]).exists()


def test_a_tracker_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    from importlib.util import find_spec

    missing = [n for n in ("swanlab", "wandb", "mlflow", "trackio") if find_spec(n) is None]
    if not missing:
        pytest.skip("every tracker is installed")
    lines: list[str] = []
    assert open_trackers(_settings(tmp_path, track=missing), lines.append) == []
    assert len(lines) == len(missing)
    assert f"pip install 'qlora-serve[{missing[0]}]'" in lines[0]


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("on_init_end", ConnectionError), ("on_train_begin", SystemExit),
        ("on_step_end", ConnectionError), ("on_log", ConnectionError),
        ("on_train_end", ConnectionError),
    ],
)  # fmt: skip
def test_a_tracker_that_fails_in_the_run_does_not_stop_it(
    event: str,
    kind: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real TensorBoard callback, broken at one event."""
    opened = tracking._open

    def open_broken(name: str, settings: TrainSettings) -> Any:
        callback = opened(name, settings)

        def fail(*_: Any, **__: Any) -> None:
            raise kind("the server\nis gone")

        setattr(callback, event, fail)
        return callback

    monkeypatch.setattr(tracking, "_open", open_broken)
    result = train(_settings(tmp_path, track=["tensorboard"], max_steps=2), lambda _: None)
    assert result.path.is_dir()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    # `on_init_end` comes before trackers are there.
    expected = [] if event == "on_init_end" else ["the server is gone"]
    assert [line.split(": ")[-1] for line in warnings] == expected


def test_a_tracker_cannot_steer_the_run() -> None:
    class Steering:
        def on_step_end(self, *_: Any, **__: Any) -> str:
            return "stop"

    guarded = GuardedTracker("x", Steering(), print)  # type: ignore[arg-type]
    assert guarded.on_step_end(None, None, None) is None


def test_every_tracker_is_one_that_transformers_knows() -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    names = TrainSettings.model_fields["track"].annotation.__args__[0].__args__  # type: ignore[union-attr]
    for name in names:
        assert len(get_reporting_integration_callbacks([name])) == 1


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match="track"):
        TrainSettings(base="b", data="d", output="o", track=["clearly-not"])
