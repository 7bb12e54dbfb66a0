"""`qlora-serve sweep`."""

import json

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.errors import TrainError
from qlora_serve.train.sweep_config import SweepSettings

app = App()


def sweep(settings: SweepSettings) -> None:
    """Train several adapters over a grid of settings, and compare them on held-out rows.

    The grid and the shared recipe stand in the YAML file. Finished points are kept: started again,
    a sweep goes on. A point that fails does not stop the others.

    Examples:

        qlora-serve sweep --config examples/recipes/tagging-sweep.yaml --output sweeps/tagging

        qlora-serve sweep --config sweep.yaml --no-answers --json
    """
    from rich.console import Console

    from qlora_serve.progress import console
    from qlora_serve.train.evaluate.show import table
    from qlora_serve.train.sweep import best
    from qlora_serve.train.sweep import sweep as run

    with libraries_on_stderr():
        result = run(settings, lambda line: console.print(line, soft_wrap=True, markup=False))
    if settings.as_json:
        content = (settings.output / "sweep.json").read_text(encoding="utf-8")
        typer.echo(json.dumps(json.loads(content) | {"best": best(result)}, indent=2))
    elif result.evaluation is not None:
        output = Console(highlight=False)
        output.print(table(result.evaluation, output.width))
        typer.echo(f"best: {settings.output / (best(result) or '')}")
        console.print(f"picture: {settings.output / 'sweep.html'}", soft_wrap=True, markup=False)
    if result.failed:
        first = next(iter(result.failed.items()))
        raise TrainError(
            f"{len(result.failed)} of {len(result.points)} points failed; first {first[0]}: "
            f"{first[1]}"
        )


app.command()(flags_from(SweepSettings)(sweep))
