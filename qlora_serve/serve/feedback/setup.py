"""Experiments from a server's settings."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from qlora_serve.adapters.folder import check_name
from qlora_serve.errors import ConfigError
from qlora_serve.serve.feedback.experiment import Experiment, make_experiment


def begin_experiments(
    splits: Mapping[str, Mapping[str, float]], file: Path | None
) -> list[Experiment]:
    """The experiments of the settings.

    Args:
        splits: variants and shares, by the experiment's name.
        file: where answers are kept.

    Raises:
        ConfigError: one cannot be, or there is nowhere to keep its answers.
    """
    if splits and file is None:
        raise ConfigError(
            f"--experiment {next(iter(splits))} needs --feedback FILE, where its answers are kept"
        )
    return [make_experiment(check_name(name), shares) for name, shares in splits.items()]


def check_experiments(
    experiments: Iterable[Experiment], models: Collection[str], reserved: Collection[str]
) -> None:
    """Checks the names.

    Args:
        experiments: of the settings.
        models: the names of base and adapters.
        reserved: those of the base.

    Raises:
        ConfigError: a variant that is no model, or a name that means one.
    """
    for experiment in experiments:
        if experiment.name in models:
            raise ConfigError(
                f"--experiment {experiment.name}: the name means a model; choose another"
            )
        for name in experiment.models:
            if name not in models:
                known = ", ".join(sorted({*models} - {*reserved} | {"base"}))
                raise ConfigError(
                    f"--experiment {experiment.name}: no model is called {name!r}; known here: "
                    f"{known}"
                )
