"""Trackers: transformers' own callbacks, kept from ever stopping a run."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qlora_serve.progress import console
from qlora_serve.train.config import TrainSettings

Warn = Callable[[str], None]

# Trackers that cannot log in have been seen to leave by `sys.exit`.
_FAILURES = (Exception, SystemExit)


def open_trackers(settings: TrainSettings, warn: Warn | None = None) -> list[TrainerCallback]:
    """A callback for each tracker of `settings.track` that can be opened.

    TensorBoard writes beside the output, to OUTPUT.tensorboard; the others go where they are set up
    to go, by their own environment variables.

    Args:
        settings: of the run.
        warn: takes the one line about a tracker that fails.
    """
    said = warn or (lambda line: console.print(line, soft_wrap=True, markup=False))
    trackers: list[TrainerCallback] = []
    for name in dict.fromkeys(settings.track):
        try:
            callback = _open(name, settings)
        except _FAILURES as error:  # whatever a tracker raises, the run goes on
            said(_warning(name, error))
            continue
        trackers.append(GuardedTracker(name, callback, said))
    return trackers


def _open(name: str, settings: TrainSettings) -> TrainerCallback:
    from importlib.util import find_spec

    from transformers.integrations import get_reporting_integration_callbacks

    if find_spec(name) is None:
        raise ImportError(f"it is not installed: pip install 'qlora-serve[{name}]'")
    (kind,) = get_reporting_integration_callbacks([name])
    callback: Any = kind()
    if name == "swanlab":
        callback._swanlab = _SwanLab(callback._swanlab)
    if name == "tensorboard":
        output = settings.output
        callback.logging_dir = str(output.with_name(f"{output.name}.tensorboard"))
    return callback


class _SwanLab:
    """The module `swanlab` as transformers' callback knows it.

    Since 0.10 `get_run` raises where no run is active; the callback expects None, and then makes
    one.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def get_run(self) -> Any:
        """The active run, or None."""
        return self._module.get_run() if self._module.has_run() else None


class GuardedTracker(TrainerCallback):
    """Hands every event to a tracker until it fails; then warns once, and is silent."""

    def __init__(self, name: str, callback: TrainerCallback, warn: Warn) -> None:
        self._name = name
        self._callback = callback
        self._warn = warn
        self.has_failed = False

    def __getattribute__(self, name: str) -> Any:
        """Events are whatever transformers calls `on_...`, now and in later versions."""
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *arguments, **others: self._hand_on(name, arguments, others)

    def _hand_on(self, event: str, arguments: tuple[Any, ...], others: dict[str, Any]) -> None:
        if self.has_failed:
            return
        try:
            # What it returns could steer the run, which is no tracker's business.
            getattr(self._callback, event)(*arguments, **others)
        except _FAILURES as error:
            self.has_failed = True
            self._warn(_warning(self._name, error))


def _warning(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"warning: {name} does not track this run any more: {reason}"
